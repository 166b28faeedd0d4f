"""What goes wrong ends in one sentence and exit code 2, and the next call goes on."""

from __future__ import annotations

import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from data_engine import cli
from data_engine.engine import Engine
from data_engine.mask_store.lineage import tombstones
from data_engine.rounds import PARTS
from data_engine.shard_writer import finished, manifest_path
from sam_train.data.sa1b import ShardSource

sys.path.insert(0, str(Path(__file__).parent))
import toy_engine

QUIET = "{stage: assisted, num_images: 3, retrain: false}"
AUTOMATIC = "{stage: automatic, num_images: 3}"
Begin = Callable[..., Path]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, toy.ckpt, and ten scenes, scenes.tar."""
    folder = tmp_path_factory.mktemp("toys")
    toy_engine.write_toy_model(folder / "toy.ckpt")
    toy_engine.write_scenes(folder / "scenes.tar", 10)
    return folder


@pytest.fixture
def begin(tmp_path: Path, toys: Path) -> Begin:
    """`begin("{stage: ...}", ...)`: the folder of a new engine; its images are in scenes.tar beside it."""

    def begun(*steps: str) -> Path:
        shutil.copy(toys / "scenes.tar", tmp_path / "scenes.tar")
        settings = toy_engine.toy_settings("toy_engine.InProcess", f"[{','.join(steps)}]")
        places = [f"images={tmp_path / 'scenes.tar'}", f"checkpoint={toys / 'toy.ckpt'}"]
        root = tmp_path / "engine"
        # Nothing is measured: that takes the longest here.
        unmeasured = ["held_out=0.3", "measure.clicks=null", "measure.proposals=null"]
        assert call("init", f"root={root}", *places, *settings, *unmeasured) == 0
        return root

    return begun


def call(*argv: str) -> int:
    return cli.main(list(argv))


def simulated(root: Path, *overrides: str) -> int:
    return call("round", f"root={root}", *toy_engine.ANNOTATOR, *overrides)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("round", ...)`: calls, sees that it fails as a mistake does, and gives the sentence."""

    def call_and_read(*argv: str) -> str:
        capsys.readouterr()
        assert call(*argv) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert said.startswith("data-engine: ")
        return said

    return call_and_read


def test_help_names_all_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in ("init", "round", "status", "remove"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rond", "root=x"], "did you mean round?"),
        ([], "expected one of init"),
        (["round"], "no value for root; say root=DIR"),
        (["status", "root=no/such"], "no/such holds no engine"),
        (["round", "root=no/such", "promot=always"], "promot"),
        (["init", "root=x", "images=y"], "checkpoint"),
        (["round", "loud", "root=x"], "expected NAME=VALUE, got 'loud'"),
    ],
)
def test_a_mistyped_call_is_one_sentence(
    refused: Callable[..., str], argv: list[str], message: str
) -> None:
    assert message in refused(*argv)


def test_init_takes_no_folder_that_holds_something(
    begin: Begin, refused: Callable[..., str], tmp_path: Path, toys: Path
) -> None:
    root = begin(QUIET)
    places = [f"images={toys / 'scenes.tar'}", f"checkpoint={toys / 'toy.ckpt'}"]

    assert "holds an engine already" in refused("init", f"root={root}", *places)
    assert "holds other things" in refused("init", f"root={tmp_path}", *places)


def test_init_that_was_broken_off_is_finished_by_the_same_call(begin: Begin) -> None:
    root = begin(QUIET)
    before = Engine.open(root).store.contents()
    (root / "engine.yaml").unlink()  # what is written last

    begin(QUIET)

    assert Engine.open(root).store.contents() == before


def test_a_store_that_is_gone_or_locked_is_named(begin: Begin, refused: Callable[..., str]) -> None:
    root = begin(QUIET)
    with closing(sqlite3.connect(root / "engine.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        said = refused("round", f"root={root}", "store.busy_timeout_s=0.1")
    assert "engine.sqlite is locked" in said

    assert call("round", f"root={root}") == 0  # waits for annotators
    (root / "engine.sqlite").rename(root / "aside")
    assert "engine.sqlite: there is no store" in refused("round", f"root={root}")

    (root / "aside").rename(root / "engine.sqlite")
    assert simulated(root) == 0


def test_images_that_were_removed_are_named_and_put_back_it_goes_on(
    begin: Begin, refused: Callable[..., str], tmp_path: Path
) -> None:
    root = begin(QUIET)
    (tmp_path / "scenes.tar").rename(tmp_path / "aside.tar")

    assert "scenes.tar cannot be read" in refused("round", f"root={root}")

    (tmp_path / "aside.tar").rename(tmp_path / "scenes.tar")
    assert simulated(root) == 0
    assert Engine.open(root).store.rounds()[0].state == "done"


def test_a_model_that_finds_nothing_ends_the_round_and_other_thresholds_go_on(
    begin: Begin, refused: Callable[..., str]
) -> None:
    root = begin(AUTOMATIC)

    assert "finds no mask in any" in refused("round", f"root={root}", "preset.pred_iou_thresh=9")
    assert call("round", f"root={root}") == 0

    (round_,) = Engine.open(root).store.rounds()
    assert round_.state == "done"
    assert round_.config["masks"] > 0


def test_a_shard_that_was_removed_since(
    begin: Begin, refused: Callable[..., str], toys: Path
) -> None:
    root = begin(QUIET, AUTOMATIC)
    assert simulated(root) == 0
    assert simulated(root) == 0
    shards = root / "rounds"
    by_people = next(shards.glob("001/shards/assisted-*.tar"))
    content = by_people.read_bytes()
    by_people.unlink()  # comes again from the store
    automatic = next(shards.glob("002/shards/automatic-*.tar"))
    automatic.rename(automatic.with_suffix(".aside"))

    assert f"{automatic} is gone or damaged" in refused("retrain", f"root={root}")

    automatic.with_suffix(".aside").rename(automatic)
    assert call("retrain", f"root={root}") == 0
    assert by_people.read_bytes() == content


@pytest.fixture
def labelled(begin: Begin) -> Iterator[Engine]:
    """Three images by people, three by the model."""
    root = begin(QUIET, AUTOMATIC)
    assert simulated(root) == 0
    assert simulated(root) == 0
    engine = Engine.open(root)
    yield engine
    engine.close()


@pytest.mark.parametrize("number", [1, 2])
def test_an_image_that_is_taken_down_is_in_no_shard_any_more(
    labelled: Engine, number: int, refused: Callable[..., str]
) -> None:
    root = labelled.root
    keys = keys_of(root)
    path, last = sorted(root.glob(f"rounds/00{number}/shards/*.tar"))  # of two images and of one
    key = sorted(keys_of(path))[0]

    assert call("remove", f"root={root}", f"image={key}", "reason=asked to", "who=carla") == 0

    assert keys_of(root) == keys - {key}
    manifest = finished(path, in_full=True)
    assert manifest is not None and manifest.images == len(keys_of(path))
    (stone,) = tombstones(labelled.store)
    assert (stone.key, stone.who, stone.shards) == (key, "carla", ())
    rows = {shard.path: shard for shard in labelled.store.shards()}
    assert rows[labelled.relative(path)].sha256 == manifest.sha256
    (alone,) = keys_of(last)
    assert call("remove", f"root={root}", f"image={alone}", "reason=asked to", "who=carla") == 0
    assert not last.exists()
    # Whole as far as the engine knows: a training goes on with what is left.
    assert call("retrain", f"root={root}") == 0
    assert "no image of this key" in refused(
        "remove", f"root={root}", "image=nobody", "reason=asked to"
    )


def keys_of(place: Path) -> set[str]:
    """The images of a shard, or of all shards of an engine."""
    paths = [place] if place.is_file() else sorted(place.glob("rounds/*/shards/*.tar"))
    source = ShardSource(path=[str(path) for path in paths])
    records = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
    return {record.key for record in records}


def test_a_round_s_parts_may_all_be_done_again(labelled: Engine) -> None:
    """As after a kill between a part and the note that it is done."""
    before = labelled.store.contents()
    shards = {path: path.read_bytes() for path in labelled.root.glob("rounds/*/shards/*.tar")}
    last = labelled.store.rounds()[-1]
    for state in PARTS[last.stage]:
        labelled.store.put_round(replace(last, state=state))
        assert call("round", f"root={labelled.root}") == 0

    assert labelled.store.contents() == before
    assert {path: path.read_bytes() for path in shards} == shards
    assert all(manifest_path(path).is_file() for path in shards)


def test_a_backup_is_a_store(labelled: Engine, tmp_path: Path) -> None:
    out = tmp_path / "copy.sqlite"

    assert call("backup", f"root={labelled.root}", f"out={out}") == 0

    copy = Engine.open(labelled.root, [f"store.url={out}"])
    assert copy.store.contents(wall_clock=True) == labelled.store.contents(wall_clock=True)
    copy.close()


def test_the_status_says_that_annotators_are_simulated(
    labelled: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("status", f"root={labelled.root}") == 0

    said = capsys.readouterr().out
    assert re.search(r"\d+ masks of simulated annotators", said)
    assert re.search(r"round 1 assisted: done; tasks \d+ done, by simulated annotators", said)


def test_an_audit_by_the_simulated_annotator_says_how_good_the_masks_are(
    labelled: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = "audit.pair=[anna,simulated-7]", "audit.num_pair_images=1"
    assert call("audit", f"root={labelled.root}", *toy_engine.ANNOTATOR, *pair) == 0

    said = capsys.readouterr().out
    assert "round 2: simulated: " in said and "over 0.90" in said
    assert "; 1 of " in said, "anna's task is hers: it waits, and nothing is refused"
    masks = sum(shard.num_masks for shard in labelled.store.shards(source="automatic"))
    assert len(labelled.store.reviews(round=2)) == masks > 0
