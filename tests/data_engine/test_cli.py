"""What goes wrong ends in one sentence and exit code 2, and the next call goes on."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import pytest
import torch

from data_engine import cli, settings
from data_engine.engine import Engine, only_one
from data_engine.mask_store.lineage import tombstones
from data_engine.records import DrawnMask, Submission
from data_engine.round_parts import _own_name
from data_engine.rounds import PARTS
from data_engine.shard_writer import finished, manifest_path
from sam_train.checkpoints.load import load_model
from sam_train.data.sa1b import ShardSource
from sam_train.ops import rle

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
    return partial(begun, tmp_path, toys)


def begun(folder: Path, toys: Path, *steps: str, overrides: Sequence[str] = ()) -> Path:
    shutil.copy(toys / "scenes.tar", folder / "scenes.tar")
    toy = toy_engine.toy_settings("toy_engine.InProcess", f"[{','.join(steps)}]")
    places = [f"images={folder / 'scenes.tar'}", f"checkpoint={toys / 'toy.ckpt'}"]
    # Nothing is measured: that takes the longest here.
    unmeasured = ["held_out=0.3", "measure.clicks=null", "measure.proposals=null"]
    root = folder / "engine"
    assert call("init", f"root={root}", *places, *toy, *unmeasured, *overrides) == 0
    return root


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

    assert "promot: there is no such" in refused("round", f"root={root}", "promot=always")
    assert "holds an engine already" in refused("init", f"root={root}", *places)
    assert "holds other things" in refused("init", f"root={tmp_path}", *places)


def test_init_that_was_broken_off_is_finished_by_the_same_call(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(begin, monkeypatch)
    root = begin(QUIET)
    begun = Engine.open(root)
    assert begun.store.num_images() == 10
    assert [model.config["kind"] for model in begun.models()] == ["sam"]
    assert not (root / "init.yaml").exists()


def test_init_that_was_broken_off_counts_for_nothing_where_another_is_called(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(begin, monkeypatch, "held_out=0.9")
    root = begin(QUIET)
    before = Engine.open(root).store.contents(wall_clock=False)
    shutil.rmtree(root)

    begin(QUIET)

    assert Engine.open(root).store.contents() == before


def broken_off(begin: Begin, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """An init that is killed while it writes its last file."""

    def killed(root: Path, _: object) -> None:
        (root / ".engine.yaml.a1b2").write_text("half of it")
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(settings, "write", killed)
        begin(QUIET, overrides=overrides)


def test_init_takes_no_store_of_another_engine(
    begin: Begin, refused: Callable[..., str], tmp_path: Path, toys: Path
) -> None:
    root = begin(QUIET)
    places = [f"images={toys / 'scenes.tar'}", f"checkpoint={toys / 'toy.ckpt'}"]
    store = f"store.url={root / 'engine.sqlite'}"

    said = refused("init", f"root={tmp_path / 'other'}", *places, store)

    assert "is the store of another engine" in said
    assert Engine.open(root).store.num_images() == 10


def test_init_says_that_nothing_can_be_measured(
    tmp_path: Path, toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(8):
        picture = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
        PIL.Image.fromarray(picture).save(tmp_path / f"{number}.png")
    root = tmp_path / "engine"
    places = [f"images={tmp_path}/*.png", f"checkpoint={toys / 'toy.ckpt'}", "held_out=0.5"]

    assert call("init", f"root={root}", *places, *toy_engine.toy_settings("x", f"[{QUIET}]")) == 0

    assert "no masks are known of the images that are held out" in caplog.text


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


@pytest.fixture(scope="module")
def labelled_once(tmp_path_factory: pytest.TempPathFactory, toys: Path) -> Path:
    root = begun(tmp_path_factory.mktemp("labelled"), toys, QUIET, AUTOMATIC)
    assert simulated(root) == 0
    assert simulated(root) == 0
    return root


@pytest.fixture
def labelled(labelled_once: Path, tmp_path: Path) -> Iterator[Engine]:
    """Three images by people, three by the model; a copy of one that was made elsewhere, as one may be moved."""
    engine = Engine.open(shutil.copytree(labelled_once, tmp_path / "engine"))
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


def test_what_came_from_an_image_is_named_and_pictures_of_it_go(
    labelled: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    root = labelled.root
    key = sorted(keys_of(min(root.glob("rounds/001/shards/*.tar"))))[0]
    pictures = [
        root / "rounds/001/training_sam/figures/step_1.png",
        root / "eval/m/clicks/figures/worst.png",
    ]
    for picture in pictures:
        picture.parent.mkdir(parents=True)
        picture.write_bytes(b"")
    unfinished = root / "rounds/001/figures/.random.png.killed"
    unfinished.write_bytes(b"")
    capsys.readouterr()

    assert call("lineage", f"root={root}", f"image={key}") == 0

    said = capsys.readouterr().out
    assert "rounds/001/shards/assisted-000000.tar" in said
    assert "rounds: 1\n" in said and "rounds/001/figures/images.png" in said
    before = {path: path.read_bytes() for path in root.glob("rounds/001/figures/*.png")}
    assert call("remove", f"root={root}", f"image={key}", "reason=asked to") == 0
    assert not pictures[0].exists() and not unfinished.exists()
    assert pictures[1].exists()  # only held-out images are shown there
    assert (root / "rounds/001/report.html").is_file()
    after = {path: path.read_bytes() for path in root.glob("rounds/001/figures/*.png")}
    assert (
        after[root / "rounds/001/figures/images.png"]
        != before[root / "rounds/001/figures/images.png"]
    )
    held_out = min(root.glob("held_out/*.tar"))
    (held_key,) = sorted(keys_of(held_out))[:1]
    assert call("remove", f"root={root}", f"image={held_key}", "reason=asked to") == 0
    assert not pictures[1].exists()
    assert held_key not in {key for path in root.glob("held_out/*.tar") for key in keys_of(path)}


def test_a_shard_that_is_not_at_hand_is_still_to_be_cleaned(
    labelled: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    root = labelled.root
    path = min(root.glob("rounds/002/shards/*.tar"))
    key, other = sorted(keys_of(path))
    typed = ("remove", f"root={root}", f"image={key}", "reason=asked to")
    path.rename(path.with_suffix(".aside"))

    assert call(*typed) == 0

    assert f"gone or damaged and may hold it: {labelled.relative(path)}" in capsys.readouterr().out
    path.with_suffix(".aside").rename(path)
    assert call(*typed) == 0
    assert "gone or damaged" not in capsys.readouterr().out
    assert keys_of(path) == {other}
    (stone,) = tombstones(labelled.store)
    assert stone.shards == ()


def test_an_image_is_taken_down_in_the_midst_of_an_automatic_round(
    begin: Begin, refused: Callable[..., str]
) -> None:
    root = begin(AUTOMATIC)
    (root / "rounds/001/shards").mkdir(parents=True)
    assert "finds no mask in any" in refused("round", f"root={root}", "preset.pred_iou_thresh=9")
    _, alone = sorted(root.glob("rounds/001/images/*.tar"))  # of two images and of one
    (key,) = keys_of(alone)
    plan = root / "rounds/001/shards/generate.json"
    stage = "preset.stability_score_thresh=0.0"
    assert call("generate", f"root={root}", "worker=1", "num_workers=2", stage) == 0
    made = root / "rounds/001/shards" / alone.name
    assert plan.is_file() and keys_of(made) == {key}

    assert call("remove", f"root={root}", f"image={key}", "reason=asked to") == 0

    assert not alone.exists() and not made.exists()
    assert call("round", f"root={root}") == 0
    assert len(keys_of(root)) == 2 and key not in keys_of(root)


def test_a_training_that_was_broken_off_begins_anew_without_an_image(labelled: Engine) -> None:
    root = labelled.root
    key = min(keys_of(next(root.glob("rounds/001/shards/*.tar"))))
    unfinished = root / "rounds/002/training_sam_1"
    unfinished.mkdir()

    assert call("remove", f"root={root}", f"image={key}", "reason=asked to") == 0

    assert not unfinished.exists()


def test_nothing_is_taken_out_under_a_round_s_hands(
    labelled: Engine, refused: Callable[..., str]
) -> None:
    key = min(keys_of(labelled.root))
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(labelled.root, held, done))
    other.start()
    held.wait()

    said = refused("remove", f"root={labelled.root}", f"image={key}", "reason=asked to")

    done.set()
    other.join()
    assert "is in use by process" in said and "wait for its end" in said
    assert key in keys_of(labelled.root)


def hold(root: Path, held: Any, done: Any) -> None:
    with only_one(root):
        held.set()
        done.wait(60)


def keys_of(place: Path) -> set[str]:
    """The images of a shard, or of all shards of an engine."""
    paths = [place] if place.is_file() else sorted(place.glob("rounds/*/shards/*.tar"))
    return keys_at(ShardSource(path=[str(path) for path in paths]))


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


def test_an_automatic_shard_that_goes_before_the_store_knows_of_it_is_not_forgotten(
    labelled: Engine, refused: Callable[..., str]
) -> None:
    root = labelled.root
    path = min(root.glob("rounds/002/shards/*.tar"))
    content = path.read_bytes()
    path.unlink()
    last = labelled.store.rounds()[-1]
    labelled.store.put_round(replace(last, state="shards"))
    assert f"{path} is gone or damaged" in refused("round", f"root={root}")

    labelled.store.put_round(replace(last, state="images"))  # its inputs come again
    assert call("round", f"root={root}") == 0

    assert path.read_bytes() == content


def test_images_that_come_after_models_were_measured_are_all_labelled(
    labelled: Engine, tmp_path: Path
) -> None:
    held_out = labelled.store.num_images(held_out=True)
    for number in range(8):
        picture = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
        PIL.Image.fromarray(picture).save(tmp_path / f"{number}.png")

    assert call("register", f"root={labelled.root}", f"images={tmp_path}/*.png") == 0

    assert labelled.store.num_images(held_out=True) == held_out
    assert labelled.store.num_images(held_out=False) == 10 - held_out + 8


def test_class_labels_travel_with_the_masks_and_every_file_says_where_it_is_from(
    begin: Begin,
) -> None:
    root = begin("{stage: assisted, num_images: 1}", overrides=["labels=[cell,debris]"])
    assert call("round", f"root={root}") == 0
    engine = Engine.open(root)
    task = engine.desk.next_task("anna")
    assert task is not None
    mask = np.zeros(engine.store.image(task.image_id).size, bool)
    mask[8:40, 8:40] = True
    drawn = DrawnMask(rle=rle.encode(mask), label="cell")
    sent = Submission(submission_id="s", task_id=task.id, version=task.version, masks=(drawn,))
    engine.desk.submit(sent, "anna")

    assert call("round", f"root={root}") == 0

    (path,) = root.glob("rounds/001/shards/*.tar")
    ((record),) = ShardSource(path=str(path)).records(
        epoch=0, reader=0, num_readers=1, shuffle=False
    )
    assert record.annotations[0].extra["label"] == "cell"
    first, trained = engine.models()
    assert first.config["checkpoint"].endswith("toy.ckpt") and first.code_version
    kept = torch.load(root / trained.path, weights_only=True)["lineage"]
    assert kept["parent"] == first.id and kept["round"] == 1
    assert kept["trained_on"] == ["rounds/001/shards/assisted-000000.tar"]
    assert kept["data_fingerprint"] == trained.data_fingerprint
    assert kept["config"] == trained.config and kept["code_version"] == trained.code_version
    assert str(root) not in json.dumps(kept)
    assert load_model(root / trained.path) is not None
    (round_,) = engine.store.rounds()
    assert round_.config["stage"]["move_on_after_s"] == 30


def test_a_training_goes_on_after_the_folder_was_moved(
    begin: Begin, refused: Callable[..., str], tmp_path: Path
) -> None:
    root = begin("{stage: assisted, num_images: 2}")
    assert simulated(root) == 0
    engine = Engine.open(root)
    before = engine.store.contents()
    engine.store.put_round(replace(engine.store.rounds()[0], state="training"))
    engine.close()
    (root / "rounds/001/training_sam/metrics.json").unlink()  # as if it had been broken off
    moved = root.rename(tmp_path / "else where (2)")

    assert call("round", f"root={moved}") == 0

    engine = Engine.open(moved)
    assert engine.store.contents() == before
    engine.store.put_round(replace(engine.store.rounds()[0], state="training"))
    otherwise = "plan.steps=[{stage: assisted, num_images: 2, overrides: ['seed=3']}]"
    said = refused("round", f"root={moved}", otherwise)
    assert "holds a training that was begun otherwise" in said


def test_two_workers_of_one_number_do_not_take_each_other_s_shards(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, done, names = context.Event(), context.Event(), context.SimpleQueue()
    other = context.Process(target=hold_name, args=(tmp_path / "workers", names, held, done))
    other.start()
    held.wait()

    with _own_name(tmp_path / "workers", 0) as name:
        assert name != names.get()

    done.set()
    other.join()
    with _own_name(tmp_path / "workers", 0) as again:
        assert again != name


def hold_name(folder: Path, names: Any, held: Any, done: Any) -> None:
    with _own_name(folder, 0) as name:
        names.put(name)
        held.set()
        done.wait(60)


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


def test_what_was_made_is_copied_to_object_storage_and_kept_up_to_date(
    labelled: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = labelled.root, f"memory://{tmp_path.name}/engine"
    key = min(keys_of(min(root.glob("rounds/002/shards/*.tar"))))

    assert call("publish", f"root={root}", f"out={out}") == 0

    published = [str(path) for path in sorted(root.glob("rounds/*/shards/*.tar"))]
    there = ShardSource(path=f"{out}/rounds/*/shards/*.tar")
    assert [path.rpartition("/engine/")[2] for path in there.shards()] == [
        path.rpartition("/engine/")[2] for path in published
    ]
    assert keys_at(there) == keys_of(root)
    bucket = fsspec.filesystem("memory")
    assert bucket.exists(f"/{tmp_path.name}/engine/rounds/001/report.html")
    assert bucket.exists(f"/{tmp_path.name}/engine/models/first.ckpt")
    capsys.readouterr()
    assert call("publish", f"root={root}", f"out={out}") == 0
    assert "0 files copied" in capsys.readouterr().out
    assert call("remove", f"root={root}", f"image={key}", "reason=asked to") == 0
    assert call("publish", f"root={root}", f"out={out}") == 0
    assert keys_at(there) == keys_of(root) and key not in keys_of(root)


def keys_at(source: ShardSource) -> set[str]:
    found = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
    return {record.key for record in found}


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
