"""Small layers that several parts share, under the published names of their weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.plain import is_plain, is_plain_gelu
from sam_train.models.products import Linear, linear


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
            Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DenseCells(NamedTuple):
    """Dense prompt embeddings as what they are made of: a linear layer of few channels.

    Attributes:
        cells: (P, h, w, K).
        weight: (C, K).
        bias: (C,).
    """

    cells: Tensor
    weight: Tensor
    bias: Tensor

    def embeddings(self) -> Tensor:
        """(P, C, h, w)."""
        return linear(*self).permute(0, 3, 1, 2)


class Downscaling(nn.Sequential):
    """SAM's reader of mask prompts: two 2x2 convolutions of stride 2 and a 1x1 (SAM, appendix A).

    It runs channels last, as matrix products: so few channels make poor convolutions.

    Args:
        in_chans: channels of the maps, 1 for a mask.
        inner_chans: width of the second layer; the first has a quarter of it.
        out_chans: C.
    """

    def __init__(self, in_chans: int, inner_chans: int, out_chans: int) -> None:
        super().__init__(
            nn.Conv2d(in_chans, inner_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(inner_chans // 4),
            nn.GELU(),
            nn.Conv2d(inner_chans // 4, inner_chans, kernel_size=2, stride=2),
            LayerNorm2d(inner_chans),
            nn.GELU(),
            nn.Conv2d(inner_chans, out_chans, kernel_size=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(P, h, w, in_chans) maps to (P, C, h / 4, w / 4)."""
        if not self.is_plain():
            return super().forward(maps.permute(0, 3, 1, 2))
        return self.cells(maps).embeddings()

    def is_plain(self) -> bool:
        """Whether `cells` may read the weights, as none of the layers does more than they say."""
        layers = list(self)
        return (
            is_plain((self,), Downscaling)
            and is_plain(layers[::3], nn.Conv2d)
            and is_plain(layers[1::3], LayerNorm2d)
            and all(is_plain_gelu(layer) for layer in layers[2::3])
        )

    def cells(self, maps: Tensor) -> DenseCells:
        """The same, its last layer left to do; where `is_plain`."""
        layers: list[Any] = list(self)
        conv1, norm1, act1, conv2, norm2, act2, conv3 = layers
        x = act1(norm1.over_last(stride_two_conv(conv1, maps)))
        x = act2(norm2.over_last(stride_two_conv(conv2, x)))
        return DenseCells(x, conv3.weight.flatten(1), conv3.bias)


def stride_two_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 2x2 convolution of stride 2 as one matrix product, on (N, H, W, C) features.

    Equal to `conv`, and several times faster than it for the few channels of mask prompts.
    """
    n, h, w, c = x.shape
    patches = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(n, h // 2, w // 2, -1)
    return linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def stride_two_deconv(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A 2x2 transposed convolution of stride 2, its sub-pixels left in an axis: (..., C) to (..., 4, C').

    The four are the rows then the columns of the 2x2 block that the pixel becomes.
    """
    return linear(x, *deconv_as_linear(conv)).unflatten(-1, (4, -1))


def deconv_as_linear(conv: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """Weight (4 * C', C) and bias (4 * C',) of `stride_two_deconv`'s linear layer."""
    assert conv.bias is not None
    return conv.weight.permute(2, 3, 1, 0).flatten(0, 2), conv.bias.repeat(4)
