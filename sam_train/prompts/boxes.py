"""Boxes as an annotator would draw them: the tight box of the mask, a little off."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_box_shifts(
    boxes: Tensor, normal: Tensor, *, sigma: float, max_shift_px: float
) -> Tensor:
    """How far each coordinate is moved in SAM's training (appendix A).

    Args:
        boxes: (P, 4) xyxy.
        normal: (P, 4) standard normal numbers.
        sigma: standard deviation, as a fraction of the box side along the coordinate's axis.
        max_shift_px: the furthest any coordinate moves, pixels of the boxes' grid.

    Returns:
        (P, 4) pixels.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return (normal.to(boxes.dtype) * sigma * sides).clamp(-max_shift_px, max_shift_px)


def uniform_box_shifts(boxes: Tensor, uniform: Tensor, *, max_shift_px: float) -> Tensor:
    """How far each coordinate is moved after MedSAM: up to `max_shift_px`, all distances alike.

    MedSAM's code only ever enlarges the box, so that its model learns to expect loose ones; here a side
    is as likely to move in as out, as the paper has it. Inwards it moves by a quarter of the box's side
    at most: 20 px would turn the box of a small lesion inside out.

    Args:
        boxes: (P, 4) xyxy.
        uniform: (P, 4) numbers in [0, 1).
        max_shift_px: the furthest any coordinate moves, pixels of the boxes' grid.

    Returns:
        (P, 4) pixels.
    """
    outward = (2 * uniform.to(boxes.dtype) - 1) * max_shift_px
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    outward = torch.maximum(outward, -sides / 4)
    return outward * outward.new_tensor([-1.0, -1.0, 1.0, 1.0])


def shift_boxes(boxes: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """Moves the coordinates of boxes, keeps them on the grid and never lets a box turn inside out.

    Args:
        boxes: (P, 4) xyxy edges.
        shifts: (P, 4) pixels.
        size: (H, W) of the grid.
    """
    height, width = size
    limits = boxes.new_tensor([width, height]).repeat(2)
    moved = torch.minimum((boxes + shifts).clamp_min(0), limits)
    corners = moved.view(-1, 2, 2)
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)
