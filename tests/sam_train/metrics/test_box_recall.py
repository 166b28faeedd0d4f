"""Recall and precision of boxes, against COCO's own figures and by hand."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam_train.metrics.box_recall import BoxRecall
from sam_train.ops.boxes import xywh_to_xyxy
from sam_train.structures import Annotation, DetectedBoxes

SQUARES = [(0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 10.0, 10.0), (40.0, 0.0, 10.0, 10.0)]


def objects(boxes: list[tuple[float, float, float, float]]) -> list[Annotation]:
    return [Annotation(id=i, rle={}, bbox=box, area=box[2] * box[3]) for i, box in enumerate(boxes)]


def found(boxes: list[tuple[float, float, float, float]], scores: list[float]) -> DetectedBoxes:
    edges = xywh_to_xyxy(torch.tensor(boxes).reshape(-1, 4))
    return DetectedBoxes(edges, torch.tensor(scores))


def test_confident_boxes_count_once_an_object() -> None:
    metrics = BoxRecall()
    shifted = (20.0, 2.0, 10.0, 10.0)  # IoU 2 / 3

    # The first object is found twice, the second at four of ten IoUs, the third by nobody.
    metrics.update(objects(SQUARES), found([SQUARES[0], SQUARES[0], shifted], [0.9, 0.8, 0.6]))

    scores = metrics.compute()
    assert scores["box_average_recall@10"] == pytest.approx((1 + 0.4) / 3)
    assert scores["box_recall_50@10"] == pytest.approx(2 / 3)
    assert scores["confident_precision"] == pytest.approx(1 / 2)
    assert scores["confident_recall"] == pytest.approx(1 / 3)
    assert metrics.num_masks == 3


def test_it_is_cocos_average_recall() -> None:
    rng = np.random.default_rng(0)
    metrics, truth, results = BoxRecall(), [], []
    for image in range(1, 6):
        boxes = np.hstack([rng.uniform(0, 100, (12, 2)), rng.uniform(4, 40, (12, 2))])
        near = np.repeat(boxes, 2, axis=0) + rng.normal(0, 2, (24, 4))
        near[:, 2:] = near[:, 2:].clip(1)
        scores = rng.random(24)
        rows = [tuple(box) for box in boxes.tolist()]
        metrics.update(
            objects(rows),
            DetectedBoxes(torch.from_numpy(xywh_to_xyxy(near)), torch.from_numpy(scores)),
        )
        truth += [(image, box, None) for box in boxes.tolist()]
        results += [(image, *pair) for pair in zip(near.tolist(), scores.tolist(), strict=True)]

    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCOeval(coco(truth), coco(results), "bbox")
        theirs.params.useCats = 0
        theirs.params.maxDets = [10, 100, 1000]
        theirs.evaluate()
        theirs.accumulate()
    recall = theirs.eval["recall"][:, 0, 0]
    scores = metrics.compute()
    for n, name in enumerate(("10", "100", "1000")):
        assert scores[f"box_average_recall@{name}"] == pytest.approx(recall[:, n].mean())
        assert scores[f"box_recall_50@{name}"] == pytest.approx(recall[0, n])


def test_what_there_is_nothing_of_is_left_out_and_an_image_without_boxes_counts() -> None:
    metrics = BoxRecall()

    metrics.update(objects(SQUARES), found([], []))

    scores = metrics.compute()
    assert scores["box_average_recall@100"] == 0
    assert "confident_precision" not in scores


def test_boxes_in_an_image_without_objects_are_wrong() -> None:
    metrics = BoxRecall()

    metrics.update(objects(SQUARES), found(SQUARES[:1], [0.9]))
    metrics.update([], found(SQUARES[:1], [0.9]))

    assert metrics.compute()["confident_precision"] == pytest.approx(0.5)


def test_sources_weigh_alike() -> None:
    metrics = BoxRecall(("many", "few"))

    metrics.update(objects(SQUARES), found([], []), "many")
    metrics.update(objects(SQUARES[:1]), found(SQUARES[:1], [0.9]), "few")

    scores = metrics.compute()
    assert scores["box_recall_50@10"] == pytest.approx(0.5)
    assert (scores["many/box_recall_50@10"], scores["few/box_recall_50@10"]) == (0, 1)


def coco(entries: list[tuple]) -> COCO:
    annotations = [
        {
            "id": i + 1,
            "image_id": image,
            "category_id": 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        | ({} if score is None else {"score": score})
        for i, (image, box, score) in enumerate(entries)
    ]
    own = COCO()
    images = [{"id": i} for i in sorted({entry[0] for entry in entries})]
    own.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations}
    own.createIndex()
    return own
