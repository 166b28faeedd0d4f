"""Where a click is and where an image token is, in one code (Tancik et al. 2020; SAM, appendix A)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of positions in [0, 1]^2.

    Args:
        num_pos_feats: half the width of the code.
        scale: standard deviation of the frequencies, in cycles per half image side.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_pos_feats: int, scale: float = 1.0) -> None:
        super().__init__()
        frequencies = scale * torch.randn(2, num_pos_feats)
        self.register_buffer("positional_encoding_gaussian_matrix", frequencies)

    def encode(self, coords: Tensor) -> Tensor:
        """Codes (..., 2) positions (x, y) in [0, 1] to (..., 2 * num_pos_feats), in float32."""
        matrix = self.positional_encoding_gaussian_matrix
        with torch.autocast(device_type=coords.device.type, enabled=False):
            # The sine of a half-precision phase is noise: these few products stay in float32.
            phases = 2 * math.pi * ((2 * coords.float() - 1) @ matrix.float())
        return torch.cat([phases.sin(), phases.cos()], dim=-1).to(matrix.dtype)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """The code of every cell centre of an (H, W) grid: (C, H, W)."""
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(size[0], device=device) + 0.5) / size[0]
        x = (torch.arange(size[1], device=device) + 0.5) / size[1]
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        return self.encode(grid).permute(2, 0, 1)

    def forward_with_coords(self, coords: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Codes (..., 2) pixel positions (x, y) of an image of (H, W) pixels."""
        scale = coords.new_tensor([image_size[1], image_size[0]], dtype=torch.float32)
        return self.encode(coords.float() / scale)
