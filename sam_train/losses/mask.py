"""How far mask logits are from the ground truth, per mask and candidate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MaskLoss:
    """A weighted sum of pixel losses and dice; focal 20 and dice 1 in the paper (appendix A).

    Attributes:
        focal: weight of the focal loss, averaged over pixels.
        bce: weight of plain cross-entropy, averaged over pixels; from random weights, objects of a few
            pixels are learnt sooner with it than with the focal loss.
        dice: weight of the dice loss.
        focal_alpha: weight of foreground pixels, of background pixels 1 minus it (SAM 2's code; the
            paper names none).
        focal_gamma: how much the focal loss looks away from pixels that are right already (ditto).
    """

    focal: float = 20.0
    bce: float = 0.0
    dice: float = 1.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __call__(self, mask_logits: Tensor, gt_masks: Tensor) -> Tensor:
        """Compares logits (P, M, h, w) with ground truth (P, h, w), bool or a share: (P, M) float32."""
        if mask_logits.shape[-2:] != gt_masks.shape[-2:]:
            raise ValueError(
                "expected ground truth on the grid of the logits, "
                f"{tuple(mask_logits.shape[-2:])}, got {tuple(gt_masks.shape[-2:])}; mask_size is "
                "the side of the model's low-resolution masks"
            )
        with torch.autocast(mask_logits.device.type, enabled=False):
            logits = mask_logits.float()
            target = gt_masks[:, None].to(logits.dtype)
            probability = logits.sigmoid()
            loss = self.dice * dice_loss(probability, target)
            if self.bce or self.focal:
                cross_entropy = F.binary_cross_entropy_with_logits(
                    logits, target.expand_as(logits), reduction="none"
                )
            if self.bce:
                loss = loss + self.bce * cross_entropy.mean(dim=(-2, -1))
            if self.focal:
                loss = loss + self.focal * self._focal(probability, target, cross_entropy)
        return loss

    def _focal(self, probability: Tensor, target: Tensor, cross_entropy: Tensor) -> Tensor:
        wrong = probability + target - 2 * probability * target
        weight = self.focal_alpha * target + (1 - self.focal_alpha) * (1 - target)
        return (weight * wrong**self.focal_gamma * cross_entropy).mean(dim=(-2, -1))


def dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """1 minus the soft dice overlap, one pixel added to both sides: (..., h, w) to (...)."""
    overlap = (probability * target).sum(dim=(-2, -1))
    total = probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)
