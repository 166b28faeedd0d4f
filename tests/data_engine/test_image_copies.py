"""Images are copied where that is asked for, and read there from then on, wherever the folder moves."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image as Pillow

from data_engine.engine import Engine
from data_engine.image_copies import Copies
from data_engine.image_finding import find_images
from data_engine.images import COPIES, image_bytes, register
from data_engine.mask_store.store import Store
from data_engine.truth import CocoTruth, UnknownTruthError, known_truth
from sam_train.ops import rle
from sam_train.structures import ImageRecord

sys.path.insert(0, str(Path(__file__).parent))
from toy_engine import QUIET, call, keys_of, simulated

Begin = Callable[..., Path]
WriteShard = Callable[..., Path]


def test_the_originals_may_go_the_folder_may_move_and_a_take_down_takes_the_copy(
    begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = begin(QUIET, overrides=["copy=true"])
    (begun.parent / "scenes.tar").unlink()
    root = tmp_path / "elsewhere" / "engine"
    root.parent.mkdir()
    begun.rename(root)

    assert simulated(root) == 0
    key = sorted(keys_of(root))[0]
    engine = Engine.open(root)
    image = engine.store.images_by_key([key])[key]
    engine.close()
    copy = Path(image.path)
    assert copy.parent.parent == root / COPIES and copy.read_bytes() == image_bytes(image)
    capsys.readouterr()
    assert call("lineage", f"root={root}", f"image={key}") == 0
    assert f"copies: {copy.with_suffix('.jpg').relative_to(root)}" in capsys.readouterr().out

    assert call("remove", f"root={root}", f"image={key}", "reason=asked to", "who=carla") == 0
    assert not list(copy.parent.glob("*")) and key not in keys_of(root)


def test_masks_travel_with_copies_of_shards_and_of_coco_images(
    store: Store, tmp_path: Path, write_shard: WriteShard, synthetic_scenes: Sequence[ImageRecord]
) -> None:
    shard = write_shard(tmp_path / "in.tar", 2)
    folder = tmp_path / "coco"
    folder.mkdir()
    Pillow.fromarray(synthetic_scenes[0].image).save(folder / "of coco.PNG")
    masks = synthetic_scenes[0].annotations
    listed = tmp_path / "coco.json"
    content = {
        "images": [{"id": 1, "file_name": "of coco.PNG", "height": 96, "width": 96}],
        "annotations": [
            {"id": i, "image_id": 1, "segmentation": dict(one.rle)} for i, one in enumerate(masks)
        ],
    }
    listed.write_text(json.dumps(content))
    truth = CocoTruth(images=str(folder), annotations=str(listed))
    copies = Copies(root=tmp_path, truth=truth)
    register(store, find_images(str(shard)), copies=copies)
    register(store, find_images(str(folder), str(listed)), copies=copies)
    for original in (shard, listed):
        original.unlink()
    shutil.rmtree(folder)

    images = sorted(store.images(), key=lambda one: one.key)
    assert [one.key for one in images] == ["in_0", "in_1", "of_coco"]
    assert [Path(one.path).name for one in images] == ["in_0.jpg", "in_1.jpg", "of coco.PNG"]
    scenes = (*synthetic_scenes[:2], synthetic_scenes[0])
    later = CocoTruth(images=str(folder), annotations=str(listed))
    for image, scene in zip(images, scenes, strict=True):
        assert [rle.area(one) for one in later(image)] == [a.area for a in scene.annotations]


def test_what_is_copied_already_or_lies_elsewhere_comes_to_be_the_copy_once(
    store: Store, tmp_path: Path, write_shard: WriteShard, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_shard(tmp_path / "in.tar", 2, masks=False)
    copies = Copies(root=tmp_path, truth=known_truth)
    assert str(register(store, find_images(str(shard)))) == "2 new"
    moved = shard.rename(tmp_path / "elsewhere.tar")

    with caplog.at_level(logging.WARNING):
        for given in (copies, copies, None):
            assert str(register(store, find_images(str(moved)), copies=given)) == "2 known"
            images = list(store.images())
            assert all(one.member is None and Path(one.path).is_file() for one in images)
        Path(images[0].path).unlink()
        assert str(register(store, find_images(str(moved)), copies=copies)) == "2 known"
    assert not caplog.records
    moved.unlink()
    for image in images:
        assert image_bytes(image)
        with pytest.raises(UnknownTruthError, match="no JSON of SA-1B beside it"):
            known_truth(image)


def test_odd_names_and_damaged_masks_do_not_end_a_registration(
    store: Store, tmp_path: Path, synthetic_scenes: Sequence[ImageRecord]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    long = "x" * 246 + ".png"
    for name, scene in zip((long, "b.png"), synthetic_scenes, strict=False):
        Pillow.fromarray(scene.image).save(folder / name)
    (folder / "b.json").write_text('{"image": {"height": 96, "width": 96}, "annotations": [7]}')
    damaged = [{"size": [96, 96], "counts": "no run lengths"}]
    copies = Copies(root=tmp_path, truth=lambda _: damaged)

    assert str(register(store, find_images(str(folder)), copies=copies)) == "2 new"
    names = {len(Path(one.path).name) for one in store.images()}
    assert names == {len("b.png"), len("0123456789abcdef.png")}


def test_another_init_begins_without_the_copies_of_one_that_was_given_up_and_touches_nothing_else(
    begin: Begin, refused: Callable[..., str], toys: Path, tmp_path: Path
) -> None:
    root = tmp_path / "engine"
    old, other = root / COPIES / ("0" * 16), root / COPIES / "mine"
    for path in (old, other):
        path.mkdir(parents=True)
        (path / "old.jpg").write_bytes(b"old")
    (root / "init.yaml").write_text("told: otherwise")

    assert begin(QUIET, overrides=["copy=true"]) == root

    assert len(list((root / COPIES).glob("*/*.json"))) == 10
    assert not old.exists() and other.exists()


def test_a_folder_with_images_of_ones_own_is_no_place_for_an_engine(
    refused: Callable[..., str], toys: Path, tmp_path: Path
) -> None:
    photographs = tmp_path / "root" / "images"
    photographs.mkdir(parents=True)
    (photographs / "a.jpg").write_bytes(b"mine")
    said = refused(
        *(
            "init",
            f"root={tmp_path / 'root'}",
            f"images={toys / 'scenes.tar'}",
            "plan=nuclei_small",
        ),
        f"checkpoint={toys / 'toy.ckpt'}",
    )
    assert "holds other things" in said and (photographs / "a.jpg").exists()
