"""The bar that needs no learning: grow a region of like colour from the first click.

The tolerance and the kind of range are chosen once for a whole data set, with its ground truth in
hand: the best that a flood fill can do there, not what a user would get.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from sam_train.ops import rle
from sam_train.prompts.points import center_click
from sam_train.structures import ImageRecord

TOLERANCES = (2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80)


def flood_fill_mask(
    image: np.ndarray, point_xy: tuple[int, int], tolerance: int, *, fixed_range: bool = True
) -> np.ndarray:
    """The region of like colour round a point.

    Args:
        image: (H, W, 3) uint8 RGB.
        point_xy: pixel indices.
        tolerance: largest difference in each channel, in grey levels.
        fixed_range: compare with the point's own colour; otherwise with that of the neighbour from
            which the fill came, so that it follows gradients.

    Returns:
        (H, W) bool.
    """
    filled = np.zeros((image.shape[0] + 2, image.shape[1] + 2), np.uint8)
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | (255 << 8)
    flags |= cv2.FLOODFILL_FIXED_RANGE if fixed_range else 0
    span = (tolerance,) * 3
    # With MASK_ONLY the image is only read; OpenCV asks for a writable array all the same.
    pixels = image if image.flags.writeable else image.copy()
    cv2.floodFill(pixels, filled, point_xy, 0, span, span, flags)
    return filled[1:-1, 1:-1] > 0


@dataclass(frozen=True, kw_only=True)
class FloodFillScore:
    """What a flood fill reaches on a data set.

    Attributes:
        mean_iou: mean over masks at the best setting.
        tolerance, fixed_range: that setting.
        num_images, num_masks: what it was measured on.
        table: mean IoU of each (fixed_range, tolerance).
    """

    mean_iou: float
    tolerance: int
    fixed_range: bool
    num_images: int
    num_masks: int
    table: dict[tuple[bool, int], float]


def score_flood_fill(
    records: Iterable[ImageRecord], tolerances: Sequence[int] = TOLERANCES
) -> FloodFillScore:
    """Mean IoU at original resolution from one click a mask, over all masks of `records`."""
    settings = [(fixed, tolerance) for fixed in (True, False) for tolerance in tolerances]
    rows: list[list[float]] = []
    num_images = 0
    for record in records:
        num_images += 1
        pixels = record.image.copy()
        masks = rle.decode_many([annotation.rle for annotation in record.annotations])
        clicks = center_click(torch.from_numpy(masks), None).coords.long().tolist()
        for mask, (x, y) in zip(masks, clicks, strict=True):
            fills = (flood_fill_mask(pixels, (x, y), t, fixed_range=f) for f, t in settings)
            rows.append([_iou(mask, fill) for fill in fills])
    if not rows:
        raise ValueError("the flood fill needs at least one record with a mask, got none")
    means = dict(zip(settings, np.mean(rows, axis=0).tolist(), strict=True))
    best = max(settings, key=means.__getitem__)
    return FloodFillScore(
        mean_iou=means[best],
        tolerance=best[1],
        fixed_range=best[0],
        num_images=num_images,
        num_masks=len(rows),
        table=means,
    )


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    return int(np.count_nonzero(first & second)) / int(np.count_nonzero(first | second))
