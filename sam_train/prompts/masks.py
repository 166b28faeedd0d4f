"""Masks as prompts: an earlier answer fed back, or a mask somebody brings along."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_train.structures import MaskPrediction

GIVEN_MASK_LOGIT = 10.0
"""How sure a mask brought along is of every pixel, as a logit; SAM 2's code takes the same."""


def best_candidate(prediction: MaskPrediction) -> Tensor:
    """Returns (P,) int64: of each prompt's candidates the one of highest predicted IoU."""
    return prediction.iou_predictions.detach().argmax(dim=1)


def chosen_logits(prediction: MaskPrediction, chosen: Tensor) -> Tensor:
    """What is fed back with the next click: the chosen candidate's logits, as they are.

    Neither thresholded (SAM, appendix A: all the model knew is passed on) nor part of the graph: each
    pass learns from its own prompts.

    Args:
        prediction: P prompts with M candidates.
        chosen: (P,) indices below M.

    Returns:
        (P, 1, h, w) logits.
    """
    rows = torch.arange(len(chosen), device=chosen.device)
    return prediction.low_res_masks.detach()[rows, chosen][:, None]


def given_mask_logits(masks: Tensor) -> Tensor:
    """Makes mask prompts of (P, H, W) bool masks: (P, 1, H, W) logits of plus or minus 10."""
    return (masks.float()[:, None] * 2 - 1) * GIVEN_MASK_LOGIT
