"""Small layers that several parts share, under the published names of their weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of (N, C, H, W) features.

    Args:
        num_channels: C.
        eps: 1e-6, as in the published model.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.over_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def over_last(self, x: Tensor) -> Tensor:
        """The same over the last axis: (..., C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., input_dim) -> (..., output_dim)."""

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, *, num_layers: int
    ) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def stride_two_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 2x2 convolution of stride 2 as one matrix product, on (N, H, W, C) features.

    Equal to `conv`, and several times faster than it for the few channels of mask prompts.
    """
    n, h, w, c = x.shape
    patches = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(n, h // 2, w // 2, -1)
    return F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def stride_two_deconv(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A 2x2 transposed convolution of stride 2, its sub-pixels left in an axis: (..., C) to (..., 4, C').

    The four are the rows then the columns of the 2x2 block that the pixel becomes.
    """
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    assert conv.bias is not None
    return F.linear(x, weight, conv.bias.repeat(4)).unflatten(-1, (4, -1))
