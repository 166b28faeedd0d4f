"""Images are copied where that is asked for, and read there from then on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image as Pillow

from data_engine.engine import Engine
from data_engine.image_copies import Copies
from data_engine.image_finding import find_images
from data_engine.images import image_bytes, register
from data_engine.mask_store.store import Store
from data_engine.truth import UnknownTruthError, known_truth
from sam_train.ops import rle
from sam_train.structures import ImageRecord

sys.path.insert(0, str(Path(__file__).parent))
from toy_engine import QUIET, call, keys_of, simulated

Begin = Callable[..., Path]
WriteShard = Callable[..., Path]


def test_the_originals_may_go_and_a_take_down_takes_the_copy(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    root = begin(QUIET, overrides=["copy=true"])
    (root.parent / "scenes.tar").unlink()

    assert simulated(root) == 0
    key = sorted(keys_of(root))[0]
    engine = Engine.open(root)
    image = engine.store.images_by_key([key])[key]
    engine.close()
    copy = Path(image.path)
    assert copy.parent.parent == root / "images" and copy.read_bytes() == image_bytes(image)
    capsys.readouterr()
    assert call("lineage", f"root={root}", f"image={key}") == 0
    assert f"copies: {copy.relative_to(root)}" in capsys.readouterr().out

    assert call("remove", f"root={root}", f"image={key}", "reason=asked to", "who=carla") == 0
    assert not list(copy.parent.glob("*")) and key not in keys_of(root)


def test_masks_travel_with_copies_of_shards_and_of_coco_images(
    store: Store, tmp_path: Path, write_shard: WriteShard, synthetic_scenes: Sequence[ImageRecord]
) -> None:
    shard = write_shard(tmp_path / "in.tar", 2)
    folder = tmp_path / "coco"
    folder.mkdir()
    Pillow.fromarray(synthetic_scenes[0].image).save(folder / "of coco.PNG")
    expected = [[a.area for a in scene.annotations] for scene in synthetic_scenes[:2]]

    def truth(image: object) -> object:
        if image.member is not None:  # type: ignore[attr-defined]
            return known_truth(image)  # type: ignore[arg-type]
        return [synthetic_scenes[0].annotations[0].rle]

    copies = Copies(folder=tmp_path / "images", truth=truth)  # type: ignore[arg-type]
    for place in (shard, folder):
        register(store, find_images(str(place)), copies=copies)

    images = sorted(store.images(), key=lambda one: one.key)
    assert [one.key for one in images] == ["in_0", "in_1", "of_coco"]
    assert [Path(one.path).name for one in images] == ["in_0.jpg", "in_1.jpg", "of coco.PNG"]
    found = [[rle.area(one) for one in known_truth(image)] for image in images]
    assert found == [*expected, expected[0][:1]]
    content = json.loads(Path(images[2].path).with_suffix(".json").read_text())
    assert content["image"]["file_name"] == "of coco.PNG"


def test_what_is_copied_already_or_lies_elsewhere_comes_to_be_the_copy_once(
    store: Store, tmp_path: Path, write_shard: WriteShard
) -> None:
    shard = write_shard(tmp_path / "in.tar", 2, masks=False)
    copies = Copies(folder=tmp_path / "images", truth=known_truth)
    assert str(register(store, find_images(str(shard)))) == "2 new"

    for _ in range(2):
        assert str(register(store, find_images(str(shard)), copies=copies)) == "2 known"
        images = list(store.images())
        assert all(copies.has(one) and one.member is None for one in images)
        assert sorted(one.id for one in images) == sorted(
            one.id for one in store.images_by_key(["in_0", "in_1"]).values()
        )
    shard.unlink()
    for image in images:
        assert image_bytes(image)
        with pytest.raises(UnknownTruthError, match="no JSON of SA-1B beside it"):
            known_truth(image)
    moved = tmp_path / "elsewhere"
    (tmp_path / "images").rename(moved)
    assert str(register(store, find_images(str(moved)))) == "2 moved"


def test_another_init_begins_without_the_copies_of_one_that_was_given_up(
    begin: Begin, refused: Callable[..., str], toys: Path, tmp_path: Path
) -> None:
    root = tmp_path / "engine"
    (root / "images" / "0123").mkdir(parents=True)
    (root / "images" / "0123" / "old.jpg").write_bytes(b"old")
    (root / "init.yaml").write_text("told: otherwise")

    assert begin(QUIET, overrides=["copy=true"]) == root

    assert len(list((root / "images").glob("*/*.json"))) == 10
    assert not (root / "images" / "0123").exists()
