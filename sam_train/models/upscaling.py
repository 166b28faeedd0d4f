"""The decoder's upscaling: image tokens to features of a quarter of their side, and these to masks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models import compiled
from sam_train.models.common import LayerNorm2d, deconv_as_linear, is_two_by_two
from sam_train.models.plain import is_plain
from sam_train.models.products import linear, linear_gelu, weight_gradient


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
            and act1.approximate == act2.approximate == "none"
        )

    def first_as_linear(self) -> tuple[Tensor, Tensor]:
        """Weight (C, C) and bias (C,) of the first convolution, its four sub-pixels outermost."""
        layers: list[Any] = list(self)
        return deconv_as_linear(layers[0])

    def first(self, image_tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(P, h, w, C) to (P, h, w, 4, C / 4), before the norm, and (C / 4,) that is yet to be added, if any."""
        layers: list[Any] = list(self)
        weight, bias = deconv_as_linear(layers[0])
        if compiled.takes(image_tokens, weight):
            return linear(image_tokens, weight).unflatten(-1, (4, -1)), layers[0].bias
        return linear(image_tokens, weight, bias).unflatten(-1, (4, -1)), None

    def masks(self, upscaled: Tensor, filters: Tensor, bias: Tensor | None = None) -> Tensor:
        """What `first` gave, and filters (P, M, C / 8), to logits (P, M, 4h, 4w)."""
        layers: list[Any] = list(self)
        _, norm, _, upscale2, _ = layers
        (p, h, w), num_masks = upscaled.shape[:3], filters.shape[1]
        weights = Weights(norm.weight, norm.bias, norm.eps, *deconv_as_linear(upscale2))
        x = upscaled.flatten(1, 3).contiguous()
        first_bias = torch.zeros_like(norm.bias) if bias is None else bias
        if (
            num_masks <= compiled.MAX_MASKS
            and x.shape[1] == 4 * h * w
            and compiled.takes(x, first_bias, filters, *weights.tensors())
            and weights.fit(x, first_bias, filters)
        ):
            masks = _Masks.apply(x, first_bias, *weights, filters, _places(h, w))
        else:
            masks = _masks(x if bias is None else x + bias, weights, filters)
            # The 4x4 sub-pixels of every token stay in axes of their own until the masks, which are far
            # smaller, are put in order.
            masks = masks.reshape(p, -1, h, w, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.reshape(p, -1, 4 * h, 4 * w)


class Weights(NamedTuple):
    """Of the layers after the first.

    Attributes:
        gain, shift: (C / 4,), and
        eps: of the norm.
        weight: (4 C / 8, C / 4) and
        bias: (4 C / 8,) of the second convolution, its four sub-pixels outermost.
    """

    gain: Tensor
    shift: Tensor
    eps: float
    weight: Tensor
    bias: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.gain, self.shift, self.weight, self.bias

    def feature_bias(self) -> Tensor:
        """(C / 8,), as it is the same for every sub-pixel."""
        return self.bias[: len(self.bias) // 4]

    def fit(self, x: Tensor, bias: Tensor, filters: Tensor) -> bool:
        """Whether features (P, L, C / 4), their bias and filters (P, M, C / 8) are of as many channels."""
        return (
            x.shape[-1] == len(bias) == len(self.gain) == len(self.shift) == self.weight.shape[1]
            and 4 * filters.shape[-1] == len(self.weight) == len(self.bias)
            and len(x) == len(filters)
        )


@lru_cache(maxsize=8)
def _places(h: int, w: int) -> Tensor:
    """The pixel, row by row, of every sub-pixel, token by token: (16hw,)."""
    with torch.inference_mode(False):
        pixels = torch.arange(16 * h * w, device="cpu").view(h, 2, 2, w, 2, 2)
        return pixels.permute(0, 3, 1, 4, 2, 5).flatten()


def _masks(x: Tensor, weights: Weights, filters: Tensor) -> Tensor:
    """Features (P, L, C / 4), and filters (P, M, C / 8), to logits (P, M, 4L)."""
    gain, shift, eps, weight, bias = weights
    x = F.gelu(F.layer_norm(x, gain.shape, gain, shift, eps))
    x = linear_gelu(x, weight, bias).unflatten(-1, (4, -1)).flatten(1, 2)
    # Features first: so their gradient lies as they do.
    return (x @ filters.transpose(1, 2)).transpose(1, 2)


class _Masks(torch.autograd.Function):
    """`_masks` of features and their bias, in order of the pixels, by two loops and a product; backwards as well."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first_bias: Tensor,
        gain: Tensor,
        shift: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor,
        filters: Tensor,
        places: Tensor,
    ) -> Tensor:
        ctx.eps, ctx.places = eps, places
        weights = Weights(gain, shift, eps, weight, bias)
        inner = compiled.NormGelu(first_bias, gain, shift, eps)(x)
        features = linear(inner, weight).view(len(x), 4 * x.shape[1], -1)
        ctx.save_for_backward(x, first_bias, *weights.tensors(), filters, inner, features)
        return compiled.gelu_masks(features, weights.feature_bias(), filters, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return _Masks._backward(ctx, gradient)

    @staticmethod
    def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, inner, features = ctx.saved_tensors
        if torch.is_grad_enabled() or not compiled.takes(gradient):
            with torch.enable_grad():
                return _differentiable_gradients(ctx, inputs, gradient)
        x, first_bias, gain, shift, weight, bias, filters = inputs
        weights = Weights(gain, shift, ctx.eps, weight, bias)
        of_features, of_feature_bias, of_filters = compiled.gelu_masks_back(
            gradient, features, weights.feature_bias(), filters, ctx.places
        )
        rows = of_features.view(-1, len(weight))
        of_weight = weight_gradient(rows, inner.flatten(0, 1))
        norm = compiled.NormGelu(first_bias, gain, shift, ctx.eps)
        of_x, of_first_bias, of_gain, of_shift = norm.back(linear(rows, weight.mT).view_as(x), x)
        # All of it to the first of the four, which `feature_bias` reads.
        of_bias = torch.cat([of_feature_bias, of_feature_bias.new_zeros(len(bias) * 3 // 4)])
        return of_x, of_first_bias, of_gain, of_shift, None, of_weight, of_bias, of_filters, None


def _differentiable_gradients(
    ctx: Any, inputs: list[Tensor], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients that have gradients themselves, by torch's kernels."""
    # Detached from what comes before, but for the graph of the gradients.
    again = [x.view_as(x) for x in inputs]
    x, first_bias, gain, shift, weight, bias, filters = again
    feature_bias = bias[: len(bias) // 4].repeat(4)
    masks = _masks(x + first_bias, Weights(gain, shift, ctx.eps, weight, feature_bias), filters)
    masks = torch.zeros_like(masks).index_copy(2, ctx.places, masks)
    wanted = [x for x in again if x.requires_grad]
    found = iter(torch.autograd.grad(masks, wanted, gradient, create_graph=True))
    grads = [next(found) if x.requires_grad else None for x in again]
    return *grads[:4], None, *grads[4:], None


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
