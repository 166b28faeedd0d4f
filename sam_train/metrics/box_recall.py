"""How many objects a box detector finds, and how many of its confident boxes are objects; COCO's matching."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from sam_train.ops.boxes import xyxy_to_xywh
from sam_train.structures import Annotation, DetectedBoxes

MAX_BOXES = (10, 100, 1000)
IOUS = np.linspace(0.5, 0.95, 10)
ROWS = np.arange(len(IOUS))
CONFIDENT = 0.7
"""Score from which on a box counts as confident."""


class BoxRecall:
    """Collects images; boxes only, without classes.

    The state is one tensor of sums, so that ranks merge theirs by adding `totals`. An object counts as
    found by at most one box, boxes choose in order of their score, as in COCO's evaluation: recall is a sum
    over images there, too, so that this is COCO's average recall.

    `box_average_recall@n` looks at the n boxes of highest score of an image, at IoU 0.50 to 0.95,
    `box_recall_50@n` at IoU 0.50. Of the boxes with a score of 0.7 or more, `confident_precision` is the
    share that are objects, and `confident_recall` that of the objects they are, at IoU 0.50. What there is
    nothing of to divide by is left out.

    Of several sources each has its own, `SOURCE/NAME`, and `NAME` is their mean.

    Args:
        sources: names of the data sets that are told apart.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self.sources = tuple(sources)
        num_sums = 3 + len(MAX_BOXES) * len(IOUS)
        self.totals = torch.zeros(max(1, len(self.sources)), num_sums, dtype=torch.float64)
        """A row a source: objects, confident boxes, those that are objects, objects found by n and IoU."""

    @property
    def names(self) -> tuple[str, ...]:
        recalls = [
            f"{name}@{n}" for name in ("box_average_recall", "box_recall_50") for n in MAX_BOXES
        ]
        return (*recalls, "confident_precision", "confident_recall")

    @property
    def num_masks(self) -> int:
        """How many objects were looked for."""
        return int(self.totals[:, 0].sum())

    def update(self, objects: Sequence[Annotation], found: DetectedBoxes, source: str = "") -> None:
        """Adds one image of `source`, which counts only where several are told apart."""
        boxes = xyxy_to_xywh(found.boxes.double().cpu()).numpy()
        scores = found.scores.double().cpu().numpy()
        is_hit, ranked = _matches(objects, boxes, scores)
        is_sure = ranked >= CONFIDENT
        sums = [len(objects), is_sure.sum(), (is_sure & is_hit[0]).sum()]
        sums += [is_hit[iou, :n].sum() for n in MAX_BOXES for iou in range(len(IOUS))]
        row = self.sources.index(source) if self.sources else 0
        self.totals[row] += torch.from_numpy(np.asarray(sums, float))

    def compute(self) -> dict[str, float]:
        """The scores so far, by name."""
        rows = torch.stack([self._scores(row) for row in self.totals])
        scores = self._named(rows.nanmean(dim=0))
        if len(self.sources) > 1:
            for source, row in zip(self.sources, rows, strict=True):
                scores |= self._named(row, f"{source}/")
        return scores

    def _named(self, row: Tensor, prefix: str = "") -> dict[str, float]:
        values = zip(self.names, row.tolist(), strict=True)
        return {prefix + name: value for name, value in values if not math.isnan(value)}

    def _scores(self, totals: Tensor) -> Tensor:
        num_objects, num_sure, num_right = totals[:3]
        recalls = totals[3:].view(len(MAX_BOXES), len(IOUS)) / num_objects
        sure = torch.stack([num_right / num_sure, num_right / num_objects])
        return torch.cat([recalls.mean(dim=1), recalls[:, 0], sure])


def _matches(
    objects: Sequence[Annotation], boxes: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which xywh boxes find an object of their own at each IoU, (10, K) bool, and their scores, best first.

    As COCO's own code, which takes seconds for an image of many objects: each box takes the nearest object
    that none before it took.
    """
    order = np.argsort(-scores, kind="mergesort")[: max(MAX_BOXES)]
    is_hit = np.zeros((len(IOUS), len(order)), bool)
    if objects and len(order):
        truth = np.array([own.bbox for own in objects], float)
        # Of equally near ones the last, as there.
        ious = coco_mask.iou(boxes[order], truth, [0] * len(truth))[:, ::-1]
        is_free = np.ones((len(IOUS), len(truth)), bool)
        for box, near in enumerate(ious):
            left = np.where(is_free, near, -1.0)
            nearest = left.argmax(axis=1)
            is_hit[:, box] = left[ROWS, nearest] >= IOUS
            is_free[ROWS, nearest] &= ~is_hit[:, box]
    return is_hit, scores[order]
