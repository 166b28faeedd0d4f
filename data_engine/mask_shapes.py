"""Measures of masks that need no image: size, concavity, coverage, overlap (SAM, section 5 and figure 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from sam_train.ops import run_edges
from sam_train.ops.rle import Rle, compress, size_of


def relative_size(area_px: float, size: tuple[int, int]) -> float:
    """The square root of the share that a mask has of its image of (H, W): in [0, 1]."""
    return math.sqrt(area_px / (size[0] * size[1]))


def concavity(rle: Rle) -> float:
    """1 - area / area of the convex hull: 0 for a convex mask, near 1 for a thin ring; in [0, 1).

    The hull's area is the number of pixels whose centres it holds, so that a convex shape keeps 0 once it
    is drawn with pixels.

    Raises:
        ValueError: the mask is damaged or empty.
    """
    edges, height = run_edges.from_rle(rle), size_of(rle)[0]
    if not len(edges):
        raise ValueError("an empty mask has no hull")
    crop = run_edges.window(edges, run_edges.box(edges, height), height)
    contours, _ = cv2.findContours(
        crop.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    hull = cv2.convexHull(np.concatenate(contours))
    return 1 - run_edges.area(edges) / _lattice_points(hull[:, 0])


def _lattice_points(corners: np.ndarray) -> int:
    """The pixel centres in a convex polygon with whole corners (n, 2), its border included (Pick's theorem)."""
    steps = np.abs(np.diff(corners, axis=0, append=corners[:1]))
    on_border = int(np.gcd(steps[:, 0], steps[:, 1]).sum())
    doubled_area = round(2 * cv2.contourArea(corners)) if len(corners) > 2 else 0
    return (doubled_area + on_border) // 2 + 1


def coverage(rles: Sequence[Rle], size: tuple[int, int]) -> float:
    """The share of an image of (H, W) that is in any of its masks."""
    if not rles:
        return 0.0
    joined = run_edges.union([run_edges.from_rle(one) for one in rles])
    return run_edges.area(joined) / (size[0] * size[1])


def ious(ones: Sequence[Rle], others: Sequence[Rle]) -> np.ndarray:
    """(K, M) float64: the IoU of each of K masks with each of M of the same image."""
    if not ones or not others:
        return np.zeros((len(ones), len(others)))
    found = coco_mask.iou(
        [compress(own) for own in ones], [compress(own) for own in others], [0] * len(others)
    )
    return np.asarray(found, np.float64)
