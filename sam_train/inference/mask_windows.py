"""Brings low-resolution logits to an image's resolution, each mask only where it can be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.models.sam import Sam


class Windows(NamedTuple):
    """Logits of K masks at the image's resolution, in windows of one size.

    Attributes:
        which: (K,) int64, the masks by their place among those asked for.
        logits: (K, h, w).
        tops, lefts: (K,) int64, where each window lies in the image.
    """

    which: Tensor
    logits: Tensor
    tops: Tensor
    lefts: Tensor


class _Axis(NamedTuple):
    """How the pixels of one axis are made of the cells of the low-resolution masks.

    Attributes:
        weights: (pixels, cells): both resizings of `Sam.postprocess_masks` in one.
        first, last: (pixels,) int64 the first and last cell each pixel is made of, ascending.
    """

    weights: Tensor
    first: Tensor
    last: Tensor


class MaskUpscaler:
    """The logits of `Sam.postprocess_masks`, without those that are sure to be below the lowest cut.

    A pixel lies between the cells it is made of: where these are below, it is. Differences from
    `postprocess_masks` are float errors.

    Args:
        model: whose masks they are.
        input_size: (H, W) of the image in the model input.
        size: (H, W) the image is brought to.
    """

    def __init__(self, model: Sam, input_size: tuple[int, int], size: tuple[int, int]) -> None:
        side, cells = model.image_encoder.img_size, model.low_res_size
        self.size = size
        self._axes = [
            _axis(cells, side, length, pixels, model.device)
            for length, pixels in zip(input_size, size, strict=True)
        ]

    def windows(self, low_res_masks: Tensor, cut: float, max_logits: int) -> Iterator[Windows]:
        """All masks, those of like size together.

        Args:
            low_res_masks: (K, h, w) logits.
            cut: pixels with a logit above must be in the windows.
            max_logits: that are made at a time, if one mask has not more.
        """
        above = low_res_masks > cut
        starts, ends = zip(
            *(_span(axis, above.any(2 - n)) for n, axis in enumerate(self._axes)), strict=True
        )
        sizes = (torch.stack(ends, 1) - torch.stack(starts, 1)).clamp_min(1).cpu().numpy()
        for chunk in _chunks(sizes, max_logits):
            which = torch.from_numpy(chunk).to(low_res_masks.device)
            shape = sizes[chunk].max(axis=0).tolist()
            corners = [
                start[which].clamp(max=pixels - length)
                for start, pixels, length in zip(starts, self.size, shape, strict=True)
            ]
            parts = [
                _part(axis, corner, length)
                for axis, corner, length in zip(self._axes, corners, shape, strict=True)
            ]
            (rows, row_weights), (columns, column_weights) = parts
            cells = low_res_masks[which[:, None, None], rows[:, :, None], columns[:, None, :]]
            with torch.autocast(cells.device.type, enabled=False):  # half precision moves borders
                logits = row_weights @ (cells.float() @ column_weights.mT)
            yield Windows(which, logits, *corners)


def _axis(cells: int, side: int, length: int, pixels: int, device: torch.device) -> _Axis:
    unit = torch.eye(cells, device=device)[None, None]
    unit = F.interpolate(unit, (side, cells), mode="bilinear", align_corners=False)[:, :, :length]
    weights = F.interpolate(unit, (pixels, cells), mode="bilinear", align_corners=False)[0, 0]
    index = torch.arange(cells, device=device)
    is_part = weights != 0
    first = torch.where(is_part, index, cells).amin(1)
    last = torch.where(is_part, index, -1).amax(1)
    return _Axis(weights, first, last)


def _span(axis: _Axis, occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First pixel and one past the last that (K, cells) bool of occupied cells are part of."""
    index = torch.arange(occupied.shape[1], device=occupied.device)
    low = torch.where(occupied, index, occupied.shape[1]).amin(1)
    high = torch.where(occupied, index, -1).amax(1)
    start = torch.searchsorted(axis.last, low)
    end = torch.searchsorted(axis.first, high, right=True)
    return torch.minimum(start, end), end


def _chunks(sizes: np.ndarray, max_logits: int) -> Iterator[np.ndarray]:
    """Indices of (K, 2) sizes, the smallest first, that fit together if all are made as large."""
    order = np.argsort(sizes.prod(axis=1), kind="stable")
    start = 0
    while start < len(order):
        largest = np.maximum.accumulate(sizes[order[start:]], axis=0).prod(axis=1)
        fitting = largest * np.arange(1, len(largest) + 1) <= max_logits
        end = start + max(1, int(fitting.sum()))
        yield order[start:end]
        start = end


def _part(axis: _Axis, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The cells (K, c) that `length` pixels from each start on are made of, and (K, length, c) how."""
    pixels = starts[:, None] + torch.arange(length, device=starts.device)
    low, high = axis.first[pixels[:, 0]], axis.last[pixels[:, -1]]
    num_cells = int((high - low).max()) + 1
    low = low.clamp(max=axis.weights.shape[1] - num_cells)
    cells = low[:, None] + torch.arange(num_cells, device=starts.device)
    return cells, axis.weights[pixels[:, :, None], cells[:, None, :]]
