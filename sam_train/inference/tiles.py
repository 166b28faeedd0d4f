"""Masks of images too large for one pass: found tile by tile, put together across the seams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import ceil

import numpy as np
import torch

from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator, nms
from sam_train.inference.candidates import Candidates, FilterReport
from sam_train.inference.mask_filters import CROP_EDGE_PX, Place
from sam_train.ops import run_edges

SAME_OBJECT_IOU = 0.5
"""Two cut masks are of one object if they agree as much where their tiles overlap."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Cuts a large image in overlapping tiles.

    Attributes:
        tile_px: longest side of a tile; no image within it is cut.
        overlap_px: of neighbours, at least. What is smaller lies whole in one of them.
    """

    tile_px: int
    overlap_px: int

    def __post_init__(self) -> None:
        if not 2 * CROP_EDGE_PX < self.overlap_px <= self.tile_px / 2:
            raise ValueError(
                f"tiles overlap by more than {2 * CROP_EDGE_PX:g} pixels and by half of their side at most, "
                f"got tile_px={self.tile_px} and tile_overlap_px={self.overlap_px}"
            )

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        """The tiles of an image of (H, W), row by row: xyxy, far edges exclusive."""
        rows, columns = (self._spans(side) for side in size)
        return [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]

    def _spans(self, side: int) -> list[tuple[int, int]]:
        tile = min(self.tile_px, side)
        number = 1 + ceil((side - tile) / (self.tile_px - self.overlap_px))
        starts = [i * (side - tile) // max(1, number - 1) for i in range(number)]
        return [(start, start + tile) for start in starts]


def find_in_tiles(
    generator: SamAutomaticMaskGenerator, pixels: np.ndarray, tiling: Tiling
) -> tuple[Candidates, FilterReport]:
    """The masks of a large image; what is held at a time besides run lengths goes with the tile.

    A mask cut by a tile's edge is put together with its counterparts in the next tiles, or dropped
    where there is none: the whole object, if it is smaller than the overlap, was found there.

    Args:
        generator: for each tile.
        pixels: (H, W, C) uint8, of any array kind that can be sliced.
        tiling: how the image is cut.
    """
    size = (pixels.shape[0], pixels.shape[1])
    boxes = tiling.boxes(size)
    whole: list[Candidates] = [Candidates.none()]
    cut: list[Candidates] = []
    report = FilterReport()
    for x0, y0, x1, y1 in boxes:
        place = Place((y0, x0), (y1 - y0, x1 - x0), size)
        found, rejected = generator.find_in(pixels[y0:y1, x0:x1], place)
        is_cut = _cut_sides(found, (x0, y0, x1, y1), size).any(dim=1)
        whole.append(found.take((~is_cut).nonzero()[:, 0]))
        cut.append(found.take(is_cut.nonzero()[:, 0]))
        report = report.plus(rejected)
    merged, num_merged, num_lost = _merge(cut, boxes, size)
    num_objects = len(merged.edges)
    if generator.max_mask_area_fraction is not None:  # which each part alone may have met
        most = generator.max_mask_area_fraction * size[0] * size[1]
        fits = [i for i, edges in enumerate(merged.edges) if run_edges.area(edges) < most]
        merged = merged.take(torch.tensor(fits, dtype=torch.int64))
    found = Candidates.joined([*whole, merged])
    kept = nms(found.boxes, found.iou_predictions, generator.crop_nms_thresh)
    report = report.plus(
        FilterReport(
            cut_by_tile=num_lost,
            merged_tiles=num_merged,
            too_large=num_objects - len(merged.edges),
            duplicates_across_crops=len(found.edges) - len(kept),
        )
    )
    found, mending = generator.mend(found.take(kept), size)
    return found, report.plus(mending)._replace(kept=len(found.edges))


def _cut_sides(found: Candidates, tile: Box, size: tuple[int, int]) -> torch.Tensor:
    """(K, 4) which ends of the masks' boxes lie at an edge of their tile that is not the image's."""
    image = torch.tensor((0, 0, size[1], size[0]))
    inner = torch.tensor(tile) != image
    return ((found.boxes - torch.tensor(tile)).abs() <= CROP_EDGE_PX) & inner


def _merge(
    cut: list[Candidates], tiles: list[Box], size: tuple[int, int]
) -> tuple[Candidates, int, int]:
    """Puts the parts of each object together.

    Args:
        cut: of each tile the masks its edge cuts.
        tiles: their boxes.
        size: (H, W) of the image.

    Returns:
        The objects, how many parts were saved by that, and how many parts are left out.
    """
    group = {(t, i): (t, i) for t, found in enumerate(cut) for i in range(len(found.edges))}

    def root(part: tuple[int, int]) -> tuple[int, int]:
        while group[part] != part:
            part = group[part]
        return part

    for a, b in combinations(range(len(tiles)), 2):
        for i, j in _counterparts(cut[a], cut[b], _overlap(tiles[a], tiles[b]), size[0]):
            group[root((b, j))] = root((a, i))
    members = defaultdict(list)
    for part in group:
        members[root(part)].append(part)
    objects, num_merged = [Candidates.none()], 0
    for parts in members.values():
        merged = _put_together(parts, cut, tiles, size) if len(parts) > 1 else None
        if merged is not None:
            objects.append(merged)
            num_merged += len(parts) - 1
    joined = Candidates.joined(objects)
    return joined, num_merged, len(group) - num_merged - len(joined.edges)


def _overlap(a: Box, b: Box) -> Box | None:
    x0, y0, x1, y1 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _counterparts(
    a: Candidates, b: Candidates, shared: Box | None, height: int
) -> Iterator[tuple[int, int]]:
    """Pairs of masks, one of each of two tiles, that are each other's best match where these overlap."""
    if shared is None or not a.edges or not b.edges:
        return
    frame = run_edges.rectangle(shared, height)
    areas_a, areas_b = (
        np.array([run_edges.intersection_area(edges, frame) for edges in found.edges])
        for found in (a, b)
    )
    ious = np.zeros((len(areas_a), len(areas_b)))
    for i in np.flatnonzero(areas_a):
        for j in np.flatnonzero(areas_b):
            # As the smaller is within both, this bounds the IoU without looking at the runs.
            low, high = sorted((areas_a[i], areas_b[j]))
            if low >= SAME_OBJECT_IOU * high:
                common = run_edges.intersection_area(a.edges[i], b.edges[j])
                ious[i, j] = common / (areas_a[i] + areas_b[j] - common)
    for one, other in enumerate(ious.argmax(axis=1).tolist()):
        if ious[one, other] >= SAME_OBJECT_IOU and ious[:, other].argmax() == one:
            yield one, other


def _put_together(
    parts: list[tuple[int, int]], cut: list[Candidates], tiles: list[Box], size: tuple[int, int]
) -> Candidates | None:
    """One mask of several parts; None if it still ends at the edge of a tile."""
    taken = [cut[t].take(torch.tensor([i])) for t, i in parts]
    every = Candidates.joined(taken)
    ends = torch.cat([every.boxes[:, :2].amin(0), every.boxes[:, 2:].amax(0)])
    for (tile, _), part in zip(parts, taken, strict=True):
        is_cut = _cut_sides(part, tiles[tile], size)[0]
        if (is_cut & (part.boxes[0] == ends)).any():
            return None
    edges = run_edges.union(every.edges)
    largest = max(range(len(parts)), key=lambda i: run_edges.area(every.edges[i]))
    crops = every.crop_boxes
    return Candidates(
        [edges],
        ends[None],
        every.iou_predictions.amin()[None],
        every.stability_scores.amin()[None],
        every.point_coords[largest, None],
        torch.cat([crops[:, :2].amin(0), crops[:, 2:].amax(0)])[None],
    )
