"""Small layers that several parts share, under the published names of their weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.plain import is_plain
from sam_train.models.products import Linear, linear, runs_now


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


def can_look_at(x: Tensor) -> bool:
    """Whether the values may decide something: on a GPU a look would wait for it, in a graph there are none."""
    return x.device.type == "cpu" and type(x) is Tensor and runs_now()


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

    def expand(self, num_prompts: int) -> DenseCells:
        """One prompt's, as those of many."""
        return self._replace(cells=self.cells.expand(num_prompts, -1, -1, -1))


class Downscaling(nn.Sequential):
    """SAM's reader of mask prompts: two 2x2 convolutions of stride 2 and a 1x1 (SAM, appendix A).

    It runs channels last, as matrix products, so few channels make poor convolutions; layers that are not
    plain are called (`is_plain`).

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
        """(P, in_chans, h, w) maps to (P, C, h / 4, w / 4)."""
        return self.cells(maps).embeddings() if self._reads_weights() else super().forward(maps)

    def leaves_cells(self) -> bool:
        """Whether `cells` gives what a call would."""
        return is_plain(self, of=Downscaling) and self._reads_weights()

    def _reads_weights(self) -> bool:
        if len(self) != 7:
            return False
        layers: list[Any] = list(self)
        conv1, norm1, act1, conv2, norm2, act2, conv3 = layers
        return (
            is_plain(conv1, conv2, conv3, of=nn.Conv2d)
            and is_two_by_two(conv1, conv2)
            and conv3.kernel_size == conv3.stride == (1, 1)
            and conv3.padding == (0, 0)
            and conv3.groups == 1
            and is_plain(norm1, norm2, of=LayerNorm2d)
            and is_plain(act1, act2, of=nn.GELU)
        )

    def cells(self, maps: Tensor) -> DenseCells:
        """The same, its last layer left to do."""
        layers: list[Any] = list(self)
        conv1, norm1, act1, conv2, norm2, act2, conv3 = layers
        maps = maps.permute(0, 2, 3, 1)
        x = act1(norm1.over_last(stride_two_conv(conv1, maps)))
        x = act2(norm2.over_last(stride_two_conv(conv2, x)))
        return DenseCells(x, conv3.weight.flatten(1), conv3.bias)


def is_two_by_two(*convs: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether each takes a 2x2 block of pixels to one, or one to a block, and no block sees another."""
    return all(
        conv.kernel_size == conv.stride == (2, 2)
        and conv.padding == conv.output_padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        for conv in convs
    )


def stride_two_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 2x2 convolution of stride 2 as one matrix product, on (N, H, W, C) features.

    Equal to `conv`, and several times faster than it for the few channels of mask prompts.
    """
    n, h, w, c = x.shape
    patches = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3)
    patches = patches.reshape(n, h // 2, w // 2, 4 * c)
    return linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def deconv_as_linear(conv: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """A 2x2 transposed convolution of stride 2 as a linear layer: weight (4 * C', C) and bias (4 * C',).

    The four are the rows then the columns of the 2x2 block that the pixel becomes.
    """
    assert conv.bias is not None
    return conv.weight.permute(2, 3, 1, 0).flatten(0, 2), conv.bias.repeat(4)
