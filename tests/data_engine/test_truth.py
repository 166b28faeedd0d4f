"""Ground truth is found where an image was registered, and its absence is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image as Pillow

from data_engine.image_finding import find_images
from data_engine.images import register
from data_engine.mask_store.store import open_store
from data_engine.records import Image
from data_engine.truth import CocoTruth, UnknownTruthError, known_truth
from sam_train.ops import rle
from sam_train.structures import ImageRecord


def registered(tmp_path: Path, place: str, annotations: str | None = None) -> list[Image]:
    store = open_store(tmp_path / "engine.sqlite", create=True)
    register(store, find_images(place, annotations))
    images = sorted(store.images(), key=lambda image: image.key)
    store.close()
    return images


def test_the_masks_of_an_image_are_those_of_its_own_sample(
    tmp_path: Path, write_shard: Callable[..., Path], synthetic_scenes: Sequence[ImageRecord]
) -> None:
    shard = write_shard(tmp_path / "in.tar", 3)

    for image, scene in zip(registered(tmp_path, str(shard)), synthetic_scenes, strict=False):
        expected = [annotation.rle["counts"] for annotation in scene.annotations]
        assert [one["counts"] for one in known_truth(image)] == expected


def test_of_an_image_without_known_masks_the_reason_is_said(
    tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    (bare,) = registered(tmp_path, str(write_shard(tmp_path / "in.tar", 1, masks=False)))
    alone = Image(id="a", key="a", width=8, height=8, path="/images/a.jpg")

    with pytest.raises(UnknownTruthError, match="no JSON"):
        known_truth(bare)
    with pytest.raises(UnknownTruthError, match="no JSON of SA-1B beside it"):
        known_truth(alone)


def test_the_masks_of_a_coco_image_are_found_by_its_file(
    tmp_path: Path, synthetic_scenes: Sequence[ImageRecord]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    images, annotations = [], []
    for number, scene in enumerate(synthetic_scenes[:2]):
        Pillow.fromarray(scene.image).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 96, "width": 96})
        annotations += [
            {"id": 100 * number + i, "image_id": number, "segmentation": dict(one.rle)}
            for i, one in enumerate(scene.annotations)
        ]
    listed = tmp_path / "coco.json"
    listed.write_text(json.dumps({"images": images, "annotations": annotations}))
    found = CocoTruth(images=str(folder), annotations=str(listed))

    for image, scene in zip(
        registered(tmp_path, str(folder), str(listed)), synthetic_scenes, strict=False
    ):
        assert [rle.area(one) for one in found(image)] == [a.area for a in scene.annotations]
    with pytest.raises(UnknownTruthError, match="no annotation of"):
        found(Image(id="a", key="a", width=8, height=8, path="/images/a.jpg"))
