"""Moves coordinates between frames; nothing else in the project does.

Frames:
    original: pixels of the image as it came.
    model input: pixels of the resized image, whose longest side fills the square model input and
        whose padding lies at the bottom and right, so that it needs no offset.
    mask grid: cells of a mask that covers the padded square at `stride` input pixels a cell.

Points are (x, y) pixel indices. Scaling multiplies an index, as segment_anything does, whose prompt
encoder then adds half a pixel. A mask grid is finer business: its cell i covers the input pixels from
i * stride on, and has its centre between two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sam_train.structures import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Prompts

Array = TypeVar("Array", Tensor, np.ndarray)


def preprocess_shape(height: int, width: int, long_side: int) -> tuple[int, int]:
    """The (H, W) at which the longest side is `long_side`, rounded as segment_anything rounds."""
    scale = long_side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def to_input_frame(
    coords: Array, original_size: tuple[int, int], input_size: tuple[int, int]
) -> Array:
    """Scales (..., 2) points or (..., 4) xyxy boxes from the original to the model input frame."""
    return _scale(coords, input_size[1] / original_size[1], input_size[0] / original_size[0])


def to_original_frame(
    coords: Array, original_size: tuple[int, int], input_size: tuple[int, int]
) -> Array:
    """The inverse of `to_input_frame`."""
    return _scale(coords, original_size[1] / input_size[1], original_size[0] / input_size[0])


def grid_to_input(coords: Array, stride: float) -> Array:
    """Mask grid indices (..., 2) to the model input index at the centre of their cells."""
    return (coords + 0.5) * stride - 0.5


def input_to_grid(coords: Array, stride: float) -> Array:
    """The inverse of `grid_to_input`; round to get a cell."""
    return (coords + 0.5) / stride - 0.5


def boxes_to_grid(boxes: Array, stride: float) -> Array:
    """Boxes (..., 4) xyxy, edges in the model input frame, to edges on the mask grid."""
    return boxes / stride


def boxes_to_input(boxes: Array, stride: float) -> Array:
    """The inverse of `boxes_to_grid`."""
    return boxes * stride


def cells_inside(input_sizes: Tensor, num_cells: int, stride: float) -> Tensor:
    """Which cells of a grid over the padded square begin in the image and not in its padding.

    Args:
        input_sizes: (N, 2) the (H, W) that is not padding, pixels of the model input.
        num_cells: cells per side.
        stride: input pixels per cell.

    Returns:
        (N, num_cells, num_cells) bool.
    """
    cells = torch.arange(num_cells, device=input_sizes.device) * stride
    rows, columns = (cells < input_sizes[:, axis, None] for axis in (0, 1))
    return rows[:, :, None] & columns[:, None, :]


def prompts_to_input(prompts: Prompts, stride: float) -> Prompts:
    """Prompts on the mask grid to the model input frame: clicks are cells, box corners are edges."""
    labels = prompts.point_labels[..., None]
    is_corner = (labels == BOX_TOP_LEFT) | (labels == BOX_BOTTOM_RIGHT)
    coords = prompts.point_coords
    coords = torch.where(is_corner, boxes_to_input(coords, stride), grid_to_input(coords, stride))
    return prompts._replace(point_coords=coords)


def _scale(coords: Array, scale_x: float, scale_y: float) -> Array:
    if coords.shape[-1] not in (2, 4):
        raise ValueError(
            f"coords are points (..., 2) or boxes (..., 4), got shape {tuple(coords.shape)}"
        )
    pattern = [scale_x, scale_y] * (coords.shape[-1] // 2)
    if isinstance(coords, Tensor):
        dtype = coords.dtype if coords.is_floating_point() else torch.get_default_dtype()
        return coords.to(dtype) * torch.tensor(pattern, dtype=dtype, device=coords.device)
    dtype = coords.dtype if np.issubdtype(coords.dtype, np.floating) else np.float64
    return coords.astype(dtype) * np.asarray(pattern, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class View:
    """A window of the original image, resized, then flipped, then transposed, as the model input.

    Attributes:
        window: (x0, y0, x1, y1) whole original pixels, the end exclusive.
        resized: (h, w) of the window after resizing, before flips and transposition.
        flip_x: mirrors left and right.
        flip_y: mirrors top and bottom.
        transpose: swaps x and y, after the flips; with one flip this is a quarter turn.
    """

    window: tuple[int, int, int, int]
    resized: tuple[int, int]
    flip_x: bool = False
    flip_y: bool = False
    transpose: bool = False

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) in the model input frame."""
        height, width = self.resized
        return (width, height) if self.transpose else (height, width)

    def boxes_to_input(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (M, 4) xyxy edges, original frame, to the model input frame, not clipped."""
        x0, y0, x1, y1 = self.window
        height, width = self.resized
        x = (boxes[:, 0::2] - x0) * (width / (x1 - x0))
        y = (boxes[:, 1::2] - y0) * (height / (y1 - y0))
        if self.flip_x:
            x = width - x[:, ::-1]
        if self.flip_y:
            y = height - y[:, ::-1]
        first, second = (y, x) if self.transpose else (x, y)
        return np.stack([first[:, 0], second[:, 0], first[:, 1], second[:, 1]], axis=1)

    def grid_edges(self, stride: float, num_cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the lines of the mask grid lie in the original frame.

        Args:
            stride: input pixels per cell.
            num_cells: cells per side of the square grid.

        Returns:
            x and y of the num_cells + 1 lines, ascending and not clipped to the window: lines beyond
            it lie in the padding. `orient` puts what is measured between them into place.
        """
        lines = np.arange(num_cells + 1) * stride
        x0, y0, x1, y1 = self.window
        height, width = self.resized
        x = (width - lines)[::-1] if self.flip_x else lines
        y = (height - lines)[::-1] if self.flip_y else lines
        return x0 + x * ((x1 - x0) / width), y0 + y * ((y1 - y0) / height)

    def orient(self, values: np.ndarray) -> np.ndarray:
        """Flips and transposes an array (h, w, ...) that is still upright."""
        if self.flip_x:
            values = values[:, ::-1]
        if self.flip_y:
            values = values[::-1]
        return values.swapaxes(0, 1) if self.transpose else values
