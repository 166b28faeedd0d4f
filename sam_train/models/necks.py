"""From a backbone's features to the one image embedding that the decoder reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.common import LayerNorm2d


class SimpleNeck(nn.Sequential):
    """SAM's neck: a 1x1 and a 3x3 convolution with a layer norm each (SAM, appendix A)."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__(
            nn.Conv2d(in_chans, out_chans, kernel_size=1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )


class FPNNeck(nn.Module):
    """Sums all levels, coarse to fine, at one stride (Lin et al. 2017, with one output level).

    Levels finer than the output are left out by the encoder; coarser ones are projected, upsampled and
    added from the top down, then mixed by one 3x3 convolution.

    Args:
        in_chans: channels of the levels, fine to coarse; the first has the output's stride.
        out_chans: C of the embedding.
    """

    def __init__(self, in_chans: Sequence[int], out_chans: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, out_chans, kernel_size=1, bias=False), LayerNorm2d(out_chans)
            )
            for c in in_chans
        )
        self.mix = nn.Sequential(
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """(N, C_i, h_i, w_i) levels, fine to coarse, to (N, C, h_0, w_0)."""
        merged: Tensor | None = None
        for lateral, level in zip(reversed(self.laterals), reversed(levels), strict=True):
            here = lateral(level)
            if merged is None:
                merged = here
            else:
                size = here.shape[-2:]
                merged = here + F.interpolate(merged, size, mode="bilinear", align_corners=False)
        return self.mix(merged)


class HighResNeck(nn.Module):
    """Features of half the embedding's stride, for masks with sharper borders (as in SAM 2's decoder).

    Args:
        in_chans: channels of the backbone's level at that stride.
        embed_dim: channels of the embedding, which tells what the fine level cannot see.
        out_chans: channels of the result.
    """

    def __init__(self, in_chans: int, embed_dim: int, out_chans: int) -> None:
        super().__init__()
        self.lateral = nn.Sequential(
            nn.Conv2d(in_chans, out_chans, kernel_size=1, bias=False), LayerNorm2d(out_chans)
        )
        self.from_embedding = nn.Conv2d(embed_dim, out_chans, kernel_size=1)
        self.mix = nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1)

    def forward(self, level: Tensor, embedding: Tensor) -> Tensor:
        """(N, C', 2h, 2w) and (N, C, h, w) to (N, F, 2h, 2w)."""
        coarse = self.from_embedding(F.gelu(embedding))
        size = level.shape[-2:]
        coarse = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
        return F.gelu(self.mix(F.gelu(self.lateral(level) + coarse)))
