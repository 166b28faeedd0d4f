"""Mends masks: fills small holes, removes small islands (SAM, appendix B)."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch

from sam_train.ops.run_edges import Edges, box, run_edges, window


class Mended(NamedTuple):
    """A mask after mending.

    Attributes:
        edges: see `run_edges`.
        changed: whether a pixel was.
        largest_part: pixels of the largest connected part.
    """

    edges: Edges
    changed: bool
    largest_part: int


def mend(edges: Edges, size: tuple[int, int], min_area: float) -> Mended:
    """Fills holes and then removes islands that are smaller than `min_area`, 8-connected.

    The largest part stays whatever its size. Only the mask's surroundings are made pixels of.

    Args:
        edges: of a mask.
        size: (H, W) of its image.
        min_area: pixels.
    """
    height, width = size
    x0, y0, x1, y1 = box(edges, height)
    # With as wide a margin, what lies round the mask is as large as a hole must be to stay.
    margin = math.ceil(min_area)
    left, top = max(x0 - margin, 0), max(y0 - margin, 0)
    place = (left, top, min(x1 + margin, width), min(y1 + margin, height))
    mask = window(edges, place, height)
    filled, was_filled = _without_small(~mask, min_area, keep_largest=False)
    mask = ~filled if was_filled else mask
    mask, was_cleared = _without_small(mask, min_area, keep_largest=True)
    changed = was_filled or was_cleared
    if changed:
        as_tensor = torch.from_numpy(np.ascontiguousarray(mask))[None]
        (edges,) = run_edges(as_tensor, top=top, left=left, height=height)
    return Mended(edges, changed, max(_sizes(mask)[1], default=0))


def _without_small(
    mask: np.ndarray, min_area: float, *, keep_largest: bool
) -> tuple[np.ndarray, bool]:
    """The mask without its parts under `min_area`, and whether there were any."""
    regions, sizes = _sizes(mask)
    is_kept = np.array([False, *(size >= min_area for size in sizes)])
    if is_kept[1:].all():
        return mask, False
    if keep_largest and not is_kept.any():
        is_kept[1 + int(np.argmax(sizes))] = True
    return is_kept[regions], True


def _sizes(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """(h, w) the number of the part each pixel belongs to, from 1, and the parts' pixels."""
    if not mask.any():
        return np.zeros(mask.shape, np.int32), []
    _, regions, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return regions, stats[1:, cv2.CC_STAT_AREA].tolist()
