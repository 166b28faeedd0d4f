"""What came from an image is named, and all of it is taken down."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_engine.engine import Engine, only_one
from data_engine.mask_store.lineage import tombstones
from data_engine.shard_writer import finished

sys.path.insert(0, str(Path(__file__).parent))
from toy_engine import AUTOMATIC, call, keys_of

Begin = Callable[..., Path]


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
