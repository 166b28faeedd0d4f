"""Where an automatic mask generator looks: overlapping crops of the image, a grid of points in each."""

from __future__ import annotations

from itertools import product
from math import ceil
from typing import NamedTuple

import numpy as np


class Crop(NamedTuple):
    """A part of the image that is encoded by itself.

    Attributes:
        box: xyxy in whole pixels of the image, far edges exclusive.
        layer: 0 for the whole image, n where it is cut in 2^n x 2^n.
    """

    box: tuple[int, int, int, int]
    layer: int


def point_grid(points_per_side: int) -> np.ndarray:
    """(points_per_side^2, 2) the centres of a grid's cells, (x, y) as fractions of the sides, row by row."""
    margin = 1 / (2 * points_per_side)
    centres = np.linspace(margin, 1 - margin, points_per_side)
    x, y = np.meshgrid(centres, centres)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def point_grids(points_per_side: int, num_layers: int, downscale: int) -> list[np.ndarray]:
    """A grid for layer 0 and each of `num_layers`, whose n-th has 1 / downscale^n the points a side."""
    sides = [int(points_per_side / downscale**layer) for layer in range(num_layers + 1)]
    if sides[-1] < 1:
        raise ValueError(
            f"points_per_side={points_per_side} leaves no point in crop layer {num_layers} at "
            f"crop_n_points_downscale_factor={downscale}"
        )
    return [point_grid(side) for side in sides]


def crops(size: tuple[int, int], num_layers: int, overlap_ratio: float) -> list[Crop]:
    """The whole image, then the crops of each layer, column by column.

    Args:
        size: (H, W) of the image.
        num_layers: beyond the whole image.
        overlap_ratio: of neighbours in the first layer, as a fraction of the image's shorter side; half
            as much in each further one.
    """
    height, width = size
    found = [Crop((0, 0, width, height), 0)]
    for layer in range(1, num_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / per_side))
        crop_h, crop_w = (ceil((overlap * (per_side - 1) + side) / per_side) for side in size)
        x_starts, y_starts = (
            [(side - overlap) * i for i in range(per_side)] for side in (crop_w, crop_h)
        )
        found += [
            Crop((x, y, min(x + crop_w, width), min(y + crop_h, height)), layer)
            for x, y in product(x_starts, y_starts)
            # Of an image of a few pixels, the last ones of a layer may lie outside.
            if x < width and y < height
        ]
    return found
