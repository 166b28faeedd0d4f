"""The decoder's upscaling: image tokens to features of a quarter of their side, and these to masks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sam_train.models.common import (
    LayerNorm2d,
    deconv_as_linear,
    is_two_by_two,
    stride_two_deconv,
)
from sam_train.models.plain import is_plain
from sam_train.models.products import linear_gelu


class Upscaling(nn.Sequential):
    """Two transposed 2x2 convolutions of stride 2, a norm and GELUs (SAM, appendix A).

    Layers that are plain (`is_plain`) have their weights read, as matrix products with channels last; others
    are called.

    Args:
        dim: C; the features have C / 8 channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )

    def reads_weights(self) -> bool:
        """Whether `first` and `masks` do what a call of the layers would."""
        if not is_plain(self, of=Upscaling) or len(self) != 5:
            return False
        layers: list[Any] = list(self)
        upscale1, norm, act1, upscale2, act2 = layers
        return (
            is_plain(upscale1, upscale2, of=nn.ConvTranspose2d)
            and is_two_by_two(upscale1, upscale2)
            and is_plain(norm, of=LayerNorm2d)
            and is_plain(act1, act2, of=nn.GELU)
            and act2.approximate == "none"
        )

    def first_as_linear(self) -> tuple[Tensor, Tensor]:
        """Weight (C, C) and bias (C,) of the first convolution, its four sub-pixels outermost."""
        layers: list[Any] = list(self)
        return deconv_as_linear(layers[0])

    def first(self, image_tokens: Tensor) -> Tensor:
        """(P, h, w, C) to (P, h, w, 4, C / 4), before the norm."""
        layers: list[Any] = list(self)
        return stride_two_deconv(layers[0], image_tokens)

    def masks(self, upscaled: Tensor, filters: Tensor) -> Tensor:
        """What `first` gave, and filters (P, M, C / 8), to logits (P, M, 4h, 4w)."""
        layers: list[Any] = list(self)
        _, norm, act1, upscale2, _ = layers
        x = act1(norm.over_last(upscaled))
        x = linear_gelu(x, *deconv_as_linear(upscale2)).unflatten(-1, (4, -1))
        # The 4x4 sub-pixels of every token stay in axes of their own (P, h, w, 4, 4, C) until the
        # masks, which are far smaller, are put in order. Features first: so their gradient lies as they do.
        p, h, w = upscaled.shape[:3]
        masks = (x.flatten(1, 4) @ filters.transpose(1, 2)).transpose(1, 2)
        masks = masks.reshape(p, -1, h, w, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.reshape(p, -1, 4 * h, 4 * w)


def upscale_by_call(layers: nn.Sequential, image_tokens: Tensor, high_res: Tensor | None) -> Tensor:
    """The features, by a call of the layers.

    Args:
        layers: an `Upscaling`, or what is in its place.
        image_tokens: (P, C, h, w).
        high_res: (P, h, w, 4, C / 4), added behind the first layer.

    Returns:
        (P, C / 8, 4h, 4w).
    """
    if high_res is None:
        return layers(image_tokens)
    first, *others = layers
    cells = high_res.unflatten(3, (2, 2)).permute(0, 5, 1, 3, 2, 4)
    x = first(image_tokens) + cells.flatten(4, 5).flatten(2, 3)
    for layer in others:
        x = layer(x)
    return x
