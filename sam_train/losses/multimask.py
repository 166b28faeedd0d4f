"""The loss of one answer: of several candidates, the best one learns (SAM, section 3 and appendix A)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sam_train.losses.mask import MaskLoss
from sam_train.ops.masks import mask_iou
from sam_train.structures import MaskPrediction


class AnswerLoss(NamedTuple):
    """The losses of P answers.

    Attributes:
        total: (P,) the weighted sum.
        mask: (P,) of the candidate of lowest loss.
        iou: (P,) of the predicted IoUs.
        candidate_ious: (P, M) true IoU of each candidate on the grid of the logits.
    """

    total: Tensor
    mask: Tensor
    iou: Tensor
    candidate_ious: Tensor


@dataclass(frozen=True, kw_only=True)
class InteractiveLoss:
    """Mask loss of the best candidate and squared error of the predicted IoUs.

    Attributes:
        mask: compares logits with the ground truth.
        iou_weight: of the squared error of the predicted IoU.
        supervise_all_ious: every candidate's predicted IoU learns, so that they can be ranked; else
            only that of the candidate of lowest mask loss.
    """

    mask: MaskLoss = field(default_factory=MaskLoss)
    iou_weight: float = 1.0
    supervise_all_ious: bool = True

    def __call__(self, prediction: MaskPrediction, gt_masks: Tensor) -> AnswerLoss:
        """Scores an answer on the grid of its logits.

        Args:
            prediction: P answers of M candidates.
            gt_masks: (P, h, w) bool, or float: how much of each cell the mask covers.
        """
        mask_losses = self.mask(prediction.low_res_masks, gt_masks)
        lowest = mask_losses.argmin(dim=1, keepdim=True)
        with torch.no_grad():
            solid = gt_masks if gt_masks.dtype == torch.bool else gt_masks >= 0.5
            candidate_ious = mask_iou(prediction.low_res_masks > 0, solid[:, None])
        iou_errors = (prediction.iou_predictions.float() - candidate_ious) ** 2
        if not self.supervise_all_ious:
            iou_errors = iou_errors.gather(1, lowest)
        mask, iou = mask_losses.gather(1, lowest)[:, 0], iou_errors.mean(dim=1)
        return AnswerLoss(mask + self.iou_weight * iou, mask, iou, candidate_ious)
