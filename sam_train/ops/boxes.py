"""Box formats: xywh as in SA-1B and COCO files, xyxy everywhere else.

An xyxy box holds edges, not pixel indices: the box of pixel (0, 0) alone is (0, 0, 1, 1), which is
SA-1B's bbox [0, 0, 1, 1] with its far corner at [x + w, y + h].
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray)


def xywh_to_xyxy(boxes: Array) -> Array:
    """(..., 4) of corner and size to (..., 4) of two corners."""
    return _joined(boxes[..., :2], boxes[..., :2] + boxes[..., 2:])


def xyxy_to_xywh(boxes: Array) -> Array:
    """(..., 4) of two corners to (..., 4) of corner and size."""
    return _joined(boxes[..., :2], boxes[..., 2:] - boxes[..., :2])


def _joined(first: Array, second: Array) -> Array:
    if isinstance(first, Tensor):
        return torch.cat([first, second], dim=-1)
    return np.concatenate([first, second], axis=-1)


def masks_to_boxes(masks: Tensor) -> Tensor:
    """The tightest boxes round masks, all at once.

    Args:
        masks: (P, H, W) bool.

    Returns:
        (P, 4) float xyxy edges in the frame of the masks; zeros where a mask is empty.
    """
    if masks.ndim != 3:
        raise ValueError(f"masks are (P, H, W), got shape {tuple(masks.shape)}")
    x0, x1 = _extent(masks.any(dim=1))
    y0, y1 = _extent(masks.any(dim=2))
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First index and one past the last where rows of (P, L) bool are true; 0 and 0 where nowhere."""
    index = torch.arange(occupied.shape[1], device=occupied.device)
    end = torch.where(occupied, index + 1, 0).amax(dim=1)
    start = torch.where(occupied, index, occupied.shape[1]).amin(dim=1)
    return torch.minimum(start, end), end
