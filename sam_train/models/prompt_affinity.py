"""Which parts of the image look like what the prompt points at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.structures import BACKGROUND, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND

NUM_MAPS = 4
LOWEST_LOGIT = -8.0
LOGIT_SCALE = 4.0
RING_SHARE = 0.2


class PromptAffinity(nn.Module):
    """Adds to the dense embedding how alike every image token is to the prompted ones.

    Tokens get a short code each; the affinity of two is the product of their codes. Maps are made of the
    affinity to foreground clicks, to background clicks, to the inside of a box and to the ring round
    it. The codes have a meaning of their own, "the same object", and so can be taught directly, by all
    pairs of tokens at once (`affinity_loss`). Labels spread by feature affinity: Chen et al. 2021,
    "Conditional Diffusion for Interactive Segmentation".

    Args:
        embed_dim: C.
        code_dim: width of the codes.
        inner_dim: width of the layer that reads the maps.
    """

    def __init__(self, *, embed_dim: int, code_dim: int = 32, inner_dim: int = 32) -> None:
        super().__init__()
        self.scale = code_dim**-0.5
        self.proj = nn.Linear(embed_dim, code_dim)
        self.bias = nn.Parameter(torch.zeros(()))
        self.read = nn.Sequential(
            nn.Linear(2 * NUM_MAPS, inner_dim), nn.GELU(), nn.Linear(inner_dim, embed_dim)
        )

    def codes(self, image_embeddings: Tensor) -> Tensor:
        """(N, C, h, w) to the codes of the tokens (N, h * w, K)."""
        return self.proj(image_embeddings.flatten(2).transpose(1, 2))

    def logits(self, codes: Tensor, others: Tensor) -> Tensor:
        """Affinity of (..., A, K) to (..., B, K) codes: (..., A, B), above 0 for the same object."""
        return codes @ others.transpose(-2, -1) * self.scale + self.bias

    def forward(
        self,
        image_embeddings: Tensor,
        coords: Tensor,
        labels: Tensor,
        image_index: Tensor | None,
        pixels: tuple[int, int],
    ) -> Tensor:
        """Compares the image with the prompts.

        Args:
            image_embeddings: (N, C, h, w).
            coords: (P, N', 2) of `Prompts`, model input frame.
            labels: (P, N').
            image_index: (P,) the image each prompt belongs to; None where there is one image.
            pixels: (H, W) of the model input.

        Returns:
            (P, C, h, w), to be added to the dense prompt embedding.
        """
        h, w = image_embeddings.shape[-2:]
        codes = self.codes(image_embeddings)
        codes = codes.expand(len(coords), -1, -1) if image_index is None else codes[image_index]
        cell = coords.new_tensor([pixels[1] / w, pixels[0] / h])
        points = coords / cell  # in tokens
        limit = torch.tensor([w - 1, h - 1], device=coords.device)
        x, y = (points + 0.5 / cell).floor().long().clamp(min=0).minimum(limit).unbind(-1)
        rows = torch.arange(len(coords), device=coords.device)[:, None]
        clicked = self.logits(codes[rows, y * w + x], codes)
        maps = []
        for label in (FOREGROUND, BACKGROUND):
            is_kind = labels == label
            nearest = clicked.masked_fill(~is_kind[..., None], LOWEST_LOGIT)
            # One more, the farthest: without points there would be no largest of them.
            nearest = F.pad(nearest, (0, 0, 0, 1), value=LOWEST_LOGIT)
            maps.append(_as_input(nearest.amax(dim=1), is_kind.any(dim=1)))
        if coords.shape[1]:
            has_box = (labels == BOX_TOP_LEFT).any(dim=1)
            inside, ring = _box_and_ring(points, labels, (h, w))
        else:
            has_box = torch.zeros(len(coords), dtype=torch.bool, device=coords.device)
            inside = ring = codes.new_zeros(len(coords), h * w)
        for weights in (inside, ring):
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-3)
            pooled = weights[:, None].to(codes.dtype) @ codes
            maps.append(_as_input(self.logits(pooled, codes)[:, 0], has_box))
        read = self.read(torch.cat(maps, dim=-1))
        return read.transpose(1, 2).unflatten(2, (h, w))


def _as_input(logits: Tensor, is_given: Tensor) -> Tensor:
    """(P, L) logits as two maps (P, L, 2) of about unit size, zero where the prompt has no such part."""
    maps = torch.stack([logits.sigmoid(), logits.clamp(min=LOWEST_LOGIT) / LOGIT_SCALE], dim=-1)
    return maps * is_given[:, None, None]


def _box_and_ring(points: Tensor, labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How far each token lies in the prompt's box, and in the ring round it: (P, h * w) each.

    Points are in tokens. Edges are soft by a quarter of a token, so that the smallest box holds some.
    """
    first, last = (
        (points * (labels == kind)[..., None]).sum(dim=1)
        for kind in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)
    )
    margin = RING_SHARE * (last - first) + 1
    inside = _soft_box(first, last, size)
    return inside, (_soft_box(first - margin, last + margin, size) - inside).clamp(min=0)


def _soft_box(first: Tensor, last: Tensor, size: tuple[int, int]) -> Tensor:
    sides = []
    for axis, length in ((1, size[0]), (0, size[1])):
        centers = torch.arange(length, device=first.device) + 0.5
        after = torch.sigmoid(4 * (centers - first[:, axis, None]))
        sides.append(after * torch.sigmoid(4 * (last[:, axis, None] - centers)))
    return (sides[0][:, :, None] * sides[1][:, None]).flatten(1)
