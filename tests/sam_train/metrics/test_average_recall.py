"""Average recall of proposals: by hand where it can be counted, and by COCO's way of loading results."""

from __future__ import annotations

import numpy as np
import pytest

from sam_train.metrics.average_recall import AverageRecall
from sam_train.ops import rle
from sam_train.structures import Annotation


def square(side: int, *, shift: int = 0) -> Annotation:
    mask = np.zeros((200, 200), bool)
    mask[10 : 10 + side, 10 + shift : 10 + shift + side] = True
    run_lengths = rle.encode(mask)
    return Annotation(id=0, rle=run_lengths, bbox=rle.bbox(run_lengths), area=rle.area(run_lengths))


def test_recall_counts_the_thresholds_an_object_passes() -> None:
    metrics = AverageRecall()
    # Shifted by 8 of 40 columns: an IoU of 32 / 48, above 0.50, 0.55, 0.60 and 0.65 of ten thresholds.
    metrics.update([square(40)], [square(40, shift=8)], [1.0])

    found = metrics.compute()

    assert found["average_recall@10"] == found["average_recall_medium@10"] == pytest.approx(0.4)
    assert "average_recall_small@10" not in found


def test_only_the_best_proposals_count() -> None:
    objects = [square(20), square(120)]
    distractors = [square(60, shift=shift) for shift in range(30, 42)]
    metrics = AverageRecall()
    metrics.update(objects, [*objects, *distractors], [0.9, 0.1, *[0.5] * 12])

    found = metrics.compute()

    assert found["average_recall@10"] == pytest.approx(0.5)
    assert found["average_recall@100"] == pytest.approx(1)
    assert (found["average_recall_small@10"], found["average_recall_large@10"]) == (1, 0)


def test_an_image_without_proposals_counts() -> None:
    metrics = AverageRecall()
    metrics.update([square(20)], [], [])
    assert metrics.compute()["average_recall@1000"] == 0

    metrics.update([square(20)], [square(20)], [0.5])
    assert metrics.compute()["average_recall@1000"] == pytest.approx(0.5)
