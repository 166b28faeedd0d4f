"""The second stage shows confident masks of boxes, wherever the boxes come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_engine.embeddings import Embeddings
from data_engine.image_finding import find_images
from data_engine.images import register
from data_engine.mask_store.store import Store
from data_engine.records import Image
from data_engine.stages.assisted import AssistedStage, Queue
from data_engine.stages.semi_automatic import (
    CocoBoxes,
    DetectorBoxes,
    SemiAutomaticStage,
    semi_automatic_tasks,
)
from sam_train import config
from sam_train.inference.predictor import SamPredictor
from sam_train.models.box_detector import EncoderBoxDetector
from sam_train.models.sam import Sam
from sam_train.ops import rle
from sam_train.structures import DetectedBoxes, ImageRecord

ALL = SemiAutomaticStage(min_box_score=0, min_predicted_iou=0, min_stability=0)


@pytest.fixture
def images(store: Store, tmp_path: Path, write_shard: Callable[..., Path]) -> list[Image]:
    """Two scenes of 96 px out of a shard, in its order."""
    register(store, find_images(str(write_shard(tmp_path / "in.tar", 2))))
    return sorted(store.images(), key=lambda image: image.key)


@pytest.fixture
def predictor(built_in_sam: Sam) -> SamPredictor:
    return SamPredictor(built_in_sam)


def boxes_of(scene: ImageRecord, score: float = 0.9) -> list[dict[str, object]]:
    return [{"bbox": list(one.bbox), "score": score} for one in scene.annotations]


@pytest.fixture
def results(tmp_path: Path, synthetic_scenes: Sequence[ImageRecord]) -> Path:
    """The true boxes of both scenes, by the images' keys."""
    path = tmp_path / "results.json"
    found = [
        {"image_id": f"in_{number}", **box}
        for number in range(2)
        for box in boxes_of(synthetic_scenes[number])
    ]
    path.write_text(json.dumps(found))
    return path


def test_boxes_of_a_coco_results_file_become_masks_in_the_task(
    store: Store,
    images: list[Image],
    predictor: SamPredictor,
    results: Path,
    synthetic_scenes: Sequence[ImageRecord],
) -> None:
    tasks = semi_automatic_tasks(
        store, 3, images, predictor=predictor, boxes=CocoBoxes(results), stage=ALL, model_id="m"
    )

    for task, image, scene in zip(tasks, images, synthetic_scenes, strict=False):
        shown = task.payload["masks"]
        assert (task.image_id, task.stage, task.round) == (image.id, "semi_automatic", 3)
        assert 0 < len(shown) <= len(scene.annotations)
        ious = [one["predicted_iou"] for one in shown]
        assert ious == sorted(ious, reverse=True)
        assert {one["model_id"] for one in shown} == {"m"}
        assert all(abs(one["box_score"] - 0.9) < 1e-6 for one in shown)
        assert all(rle.size_of(one["rle"]) == image.size for one in shown)
        assert json.loads(json.dumps(task.payload)) == task.payload


@pytest.mark.parametrize("queue", ["prominence", "uncertainty"])
def test_each_image_goes_through_the_encoder_once_and_what_comes_out_is_kept(
    store: Store,
    images: list[Image],
    predictor: SamPredictor,
    results: Path,
    tmp_path: Path,
    queue: Queue,
) -> None:
    ahead = Embeddings(tmp_path / "embeddings", predictor)
    boxes = CocoBoxes(results)
    stages = replace(ALL, queue=queue), AssistedStage(queue=queue)
    expected = [
        list(stages[0].tasks(1, images, predictor, boxes)),
        list(stages[1].tasks(1, images, predictor)),
    ]
    passes: list[int] = []
    encoder = predictor.model.image_encoder
    handle = encoder.register_forward_hook(lambda *_: passes.append(1))
    try:
        found = [
            list(stages[0].tasks(1, images, predictor, boxes, look=ahead.set_and_keep)),
            list(stages[1].tasks(1, images, predictor, look=ahead.set_and_keep)),
        ]
        assert ahead.ahead(images) == 0
    finally:
        handle.remove()

    assert len(passes) == len(images)
    assert found == expected


def test_only_confident_masks_are_shown(
    predictor: SamPredictor, synthetic_scenes: Sequence[ImageRecord]
) -> None:
    scene = synthetic_scenes[0]
    predictor.set_image(scene.image)
    x, y, w, h = torch.tensor([one.bbox for one in scene.annotations]).unbind(1)
    boxes = torch.stack([x, y, x + w, y + h], dim=1)
    found = DetectedBoxes(boxes, torch.linspace(0.9, 0.1, len(boxes)))

    everything = ALL.confident_masks(predictor, found)
    middle = float(np.median([one["predicted_iou"] for one in everything]))

    by_iou = replace(ALL, min_predicted_iou=middle).confident_masks(predictor, found)
    by_score = replace(ALL, min_box_score=0.5).confident_masks(predictor, found)
    few = replace(ALL, max_masks=2).confident_masks(predictor, found)
    assert [one["rle"] for one in by_iou] == [
        one["rle"] for one in everything if one["predicted_iou"] >= middle
    ]
    assert 0 < len(by_score) < len(everything) and min(m["box_score"] for m in by_score) >= 0.5
    assert [one["rle"] for one in few] == [one["rle"] for one in everything[:2]]


def test_of_two_masks_of_one_object_one_is_shown_and_a_box_outside_is_none(
    predictor: SamPredictor, synthetic_scenes: Sequence[ImageRecord]
) -> None:
    scene = synthetic_scenes[0]
    predictor.set_image(scene.image)
    x, y, w, h = max((one.bbox for one in scene.annotations), key=lambda box: box[2] * box[3])
    box = [x, y, x + w, y + h]
    outside = [200.0, 200.0, 220.0, 220.0]
    found = DetectedBoxes(torch.tensor([box, box, outside]), torch.tensor([0.9, 0.8, 0.7]))

    assert len(replace(ALL, max_area_fraction=1).confident_masks(predictor, found)) == 1
    nothing = DetectedBoxes(torch.zeros(0, 4), torch.zeros(0))
    assert ALL.confident_masks(predictor, nothing) == []


def test_a_detector_on_the_models_own_encoder_reads_the_embedding_that_is_there(
    predictor: SamPredictor, images: list[Image], synthetic_scenes: Sequence[ImageRecord]
) -> None:
    torch.manual_seed(0)
    detector = EncoderBoxDetector(sam=predictor.model).eval()
    pixels = synthetic_scenes[0].image
    predictor.set_image(pixels)
    passes: list[int] = []
    handle = predictor.model.image_encoder.register_forward_hook(lambda *_: passes.append(1))
    try:
        found = DetectorBoxes(detector)(images[0], pixels, predictor)
    finally:
        handle.remove()

    assert passes == []
    expected = detector.detect([pixels])[0]
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-3, atol=1e-2)


def test_an_image_without_a_box_is_a_task_without_ready_made_masks(
    store: Store, images: list[Image], predictor: SamPredictor, tmp_path: Path
) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"image_id": "in_0", "bbox": [10, 10, 30, 30], "score": 0.9}]))

    tasks = semi_automatic_tasks(
        store, 1, images, predictor=predictor, boxes=CocoBoxes(path), stage=ALL
    )

    assert [len(task.payload["masks"]) for task in tasks][1] == 0 and len(tasks) == 2


def test_results_of_other_images_are_refused_and_a_coco_file_says_which_is_which(
    store: Store,
    images: list[Image],
    predictor: SamPredictor,
    tmp_path: Path,
    results: Path,
) -> None:
    numbers = {"in_0": 11, "in_1": 12}
    found = json.loads(results.read_text())
    for one in found:
        one["image_id"] = numbers[one["image_id"]]
    numbered, listed = tmp_path / "numbered.json", tmp_path / "coco.json"
    numbered.write_text(json.dumps(found))
    names = [{"id": number, "file_name": f"x/{name}.jpg"} for name, number in numbers.items()]
    listed.write_text(json.dumps({"images": names, "annotations": []}))

    with pytest.raises(ValueError, match="no box of any of 2 images"):
        semi_automatic_tasks(store, 1, images, predictor=predictor, boxes=CocoBoxes(numbered))
    boxes = CocoBoxes(numbered, listed)
    tasks = semi_automatic_tasks(store, 1, images, predictor=predictor, boxes=boxes, stage=ALL)
    assert all(task.payload["masks"] for task in tasks)


def test_the_packaged_node_builds_the_stage() -> None:
    cfg = config.compose("segment", ["images=none", "+stage=semi_automatic"])

    assert config.instantiate(cfg.stage) == SemiAutomaticStage()


def test_a_threshold_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="min_stability is in"):
        SemiAutomaticStage(min_stability=95)
