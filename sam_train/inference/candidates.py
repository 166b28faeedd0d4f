"""Masks an automatic mask generator has found so far, and what became of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sam_train.ops.run_edges import Edges


class Candidates(NamedTuple):
    """K masks in the frame of the whole image; nothing of them is as large as that.

    Attributes:
        edges: K times the borders of the runs, see `ops/run_edges.py`.
        boxes: (K, 4) int64, the first and the last pixel's x and y: x0, y0, x1, y1.
        iou_predictions: (K,).
        stability_scores: (K,).
        point_coords: (K, 2) float64, the click.
        crop_boxes: (K, 4) int64 xyxy of the crop it was found in, far edges exclusive.
    """

    edges: list[Edges]
    boxes: Tensor
    iou_predictions: Tensor
    stability_scores: Tensor
    point_coords: Tensor
    crop_boxes: Tensor

    def take(self, index: Tensor) -> Candidates:
        """Those of an (N,) int64 index, in its order."""
        return Candidates([self.edges[i] for i in index.tolist()], *(x[index] for x in self[1:]))

    @staticmethod
    def joined(parts: Sequence[Candidates]) -> Candidates:
        """All of several, one after the other."""
        return Candidates(
            [edges for part in parts for edges in part.edges],
            *(torch.cat(column) for column in zip(*(part[1:] for part in parts), strict=True)),
        )

    @staticmethod
    def none() -> Candidates:
        """Without any."""
        boxes, scores = torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0)
        points = torch.zeros(0, 2, dtype=torch.float64)
        return Candidates([], boxes, scores, scores, points, boxes)


class FilterReport(NamedTuple):
    """How many candidates each filter rejected, in the order they are asked; reports can be added.

    Attributes:
        points: clicks that were asked.
        candidates: answers to them.
        low_predicted_iou, low_stability: below these thresholds.
        at_crop_edge: cut by an edge of their crop that is not the image's.
        too_large: cover nearly all of the image.
        duplicates_in_crop, duplicates_across_crops: lost to a better one of nearly the same box.
        cut_by_tile: cut by a tile's edge, without a counterpart in the next tile.
        merged_tiles: parts of one mask, found in several tiles, that were put together.
        too_small: no part of them has `min_mask_region_area`.
        duplicates_after_mending: as above, once holes and islands were gone.
        kept: masks in the result.
    """

    points: int = 0
    candidates: int = 0
    low_predicted_iou: int = 0
    low_stability: int = 0
    at_crop_edge: int = 0
    too_large: int = 0
    duplicates_in_crop: int = 0
    duplicates_across_crops: int = 0
    cut_by_tile: int = 0
    merged_tiles: int = 0
    too_small: int = 0
    duplicates_after_mending: int = 0
    kept: int = 0

    def plus(self, other: FilterReport) -> FilterReport:
        """The sum, filter by filter."""
        return FilterReport(*(a + b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        rejects = [
            f"{number} {name.replace('_', ' ')}"
            for name, number in self._asdict().items()
            if number and name not in ("points", "candidates", "kept")
        ]
        return (
            f"{self.points} points gave {self.candidates} candidates; rejected: "
            f"{', '.join(rejects) or 'none'}; {self.kept} kept"
        )
