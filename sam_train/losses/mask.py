"""How far mask logits are from the ground truth, per mask and candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.models import compiled


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
            return self._of_sums(logits.flatten(2), target.flatten(1))

    def _of_sums(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (P, M, L) and a target (P, L)."""
        # What has no weight must not put its infinities into the gradient.
        gamma = self.focal_gamma if self.focal else None
        if (
            gamma in (None, 2)
            and target.shape == (len(logits), logits.shape[2])
            and compiled.takes(logits, target)
            and not target.requires_grad
        ):
            inputs = logits.contiguous(), target.contiguous()
            sums = _PixelSums.apply(*inputs, self.focal_alpha, gamma)
        else:
            sums = pixel_sums(logits, target, self.focal_alpha, gamma)
        area, overlap, cross_entropy, focal = sums.unbind(-1)
        loss = self.dice * dice_loss(overlap, area + target.sum(dim=1, keepdim=True))
        for weight, total in ((self.bce, cross_entropy), (self.focal, focal)):
            if weight:
                loss = loss + weight * total / logits.shape[2]
        return loss


def dice_loss(overlap: Tensor, areas: Tensor) -> Tensor:
    """1 minus the soft dice overlap, one pixel added to both sides, of the overlap and both areas together."""
    return 1 - (2 * overlap + 1) / (areas + 1)


def pixel_sums(logits: Tensor, target: Tensor, alpha: float, gamma: float | None) -> Tensor:
    """What the losses are made of, summed over the pixels.

    Args:
        logits: (P, M, L).
        target: (P, L) in [0, 1].
        alpha, gamma: `MaskLoss.focal_alpha` and `focal_gamma`; None for no focal loss, but zeros.

    Returns:
        (P, M, 4): probability, probability x target, cross-entropy and focal loss.
    """
    probability, target = logits.sigmoid(), target[:, None]
    cross_entropy = F.binary_cross_entropy_with_logits(
        logits, target.expand_as(logits), reduction="none"
    )
    if gamma is None:
        focal = torch.zeros_like(probability)
    else:
        wrong = probability + target - 2 * probability * target
        weight = alpha * target + (1 - alpha) * (1 - target)
        focal = weight * wrong**gamma * cross_entropy
    parts = (probability, probability * target, cross_entropy, focal)
    return torch.stack([part.sum(dim=-1) for part in parts], dim=-1)


class _PixelSums(torch.autograd.Function):
    """`pixel_sums` of gamma 2 in one pass, and in one backwards."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, alpha: float, gamma: float | None
    ) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.alpha, ctx.gamma = alpha, gamma
        return compiled.pixel_sums(logits, target, alpha)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, target = ctx.saved_tensors
        if torch.is_grad_enabled() or not compiled.takes(gradient):
            with torch.enable_grad():
                again = logits.view_as(logits)
                sums = pixel_sums(again, target, ctx.alpha, ctx.gamma)
                found = torch.autograd.grad(sums, again, gradient, create_graph=True)
            return *found, None, None, None
        of_logits = compiled.pixel_sums_back(gradient.contiguous(), logits, target, ctx.alpha)
        return of_logits, None, None, None
