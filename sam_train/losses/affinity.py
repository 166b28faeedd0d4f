"""Which pairs of image tokens belong to the same objects: what teaches `PromptAffinity` its codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def affinity_loss(logits: Tensor, members: Tensor) -> Tensor:
    """Cross-entropy of the pairwise affinities of one image's tokens; pairs of both kinds weigh alike.

    A pair that is in the same masks is alike, one of which only one is in a mask is not; in between,
    a part and its whole, counts the share of their masks that they have in common. Of two tokens in no
    mask nothing is known: not all objects are drawn.

    Args:
        logits: (L, L).
        members: (M, L) bool, which of the L tokens lie in which of the M masks.
    """
    with torch.no_grad():
        m = members.to(torch.float32)
        common = m.T @ m
        counts = m.sum(dim=0)
        either = counts[:, None] + counts - common
        target = common / either.clamp(min=1)
        known = (either > 0).float()
        alike, apart = target * known, (1 - target) * known
        weight = alike / alike.sum().clamp(min=1) + apart / apart.sum().clamp(min=1)
    with torch.autocast(logits.device.type, enabled=False):
        pairs = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
        return 0.5 * (weight * pairs).sum()
