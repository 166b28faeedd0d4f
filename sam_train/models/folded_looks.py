"""The looks between a few tokens and thousands of image tokens, written out with their gradients.

On a CPU, sums and copies of the image's size cost as much as the products between them. By hand, position
codes have no gradient to be summed, and what a look adds to the image tokens' gradient is one product that
starts from the gradient so far.

Shapes: P prompts, L image tokens, C channels, R rows of a prompt: heads x tokens, heads outermost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam_train.models.products import add_products, products


class LookBack(NamedTuple):
    """What the image tokens ask of the tokens, and take from them.

    Attributes:
        folded: (P, R, C) keys, scaled, the queries' projection folded into them.
        bias: (P, R) added to the scores.
        values: (P, R, C) what is added to the image tokens by the shares of a head's tokens.
    """

    folded: Tensor
    bias: Tensor
    values: Tensor


class Seen(NamedTuple):
    """Image tokens that were looked at.

    Attributes:
        image: (P, L, C), for whatever uses them next: by this way their gradients meet without a sum of
            their own.
        keys: (P, L, C), with their position codes, for the next look; no gradient comes this way.
    """

    image: Tensor
    keys: Tensor


def tokens_to_image(folded: Tensor, image: Tensor, image_pe: Tensor) -> tuple[Tensor, Seen]:
    """Each row takes a weighted mean of the image tokens, by its products with them.

    Args:
        folded: (P, R, C) queries, scaled, the keys' projection folded into them.
        image: (P, L, C).
        image_pe: (1 or P, L, C), added for the scores.

    Returns:
        (P, R, C), and the image tokens.
    """
    pooled, *seen = _TokensToImage.apply(folded, image, image_pe)
    return pooled, Seen(*seen)


def image_to_tokens(seen: Seen, image_pe: Tensor, look: LookBack, num_heads: int) -> Tensor:
    """Every image token takes, head by head, a mean of the values by its scores.

    Args:
        seen: of a look at them.
        image_pe: (1 or P, L, C) of that look.
        look: as which.
        num_heads: groups of rows whose shares sum to one.

    Returns:
        (P, L, C), with the image tokens.
    """
    return _ImageToTokens.apply(*seen, image_pe, *look, num_heads)


def add_rows(images: Tensor, image_index: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """images[image_index] + weights^T rows.

    Args:
        images: (N, L, C).
        image_index: (P,).
        weights: (P, R, L).
        rows: (P, R, C).

    Returns:
        (P, L, C).
    """
    return _AddRows.apply(images, image_index, weights, rows)


def _refuse_gradients_of_gradients() -> None:
    """`once_differentiable` leaves out, without a word, what asks by way of the inputs."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the decoder's looks on the CPU have no derivatives of derivatives: without create_graph, please"
        )


def _softmax_gradient(of_shares: Tensor, shares: Tensor, dim: int) -> Tensor:
    return torch.ops.aten._softmax_backward_data(of_shares, shares, dim, shares.dtype)


def _position_gradient(wanted: bool, image_pe: Tensor, *factors: Tensor) -> Tensor | None:
    return products(*factors).sum_to_size(image_pe.shape) if wanted else None


class _TokensToImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, folded: Tensor, image: Tensor, image_pe: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        keys = image + image_pe
        shares = products(folded, keys.mT).softmax(dim=-1)
        ctx.save_for_backward(folded, image, image_pe, keys, shares)
        ctx.mark_non_differentiable(keys)
        return products(shares, image), image, keys

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, passed: Tensor | None, _: None
    ) -> tuple[Any, ...]:
        _refuse_gradients_of_gradients()
        if gradient is None:
            return None, passed, None
        folded, image, image_pe, keys, shares = ctx.saved_tensors
        of_scores = _softmax_gradient(products(gradient, image.mT), shares, dim=-1)
        # What comes by the shares and what comes by the values, in one product.
        weights = torch.cat([shares, of_scores], dim=1).mT
        rows = torch.cat([gradient, folded], dim=1)
        return (
            products(of_scores, keys),
            products(weights, rows) if passed is None else add_products(passed, weights, rows),
            _position_gradient(ctx.needs_input_grad[2], image_pe, of_scores.mT, folded),
        )


class _ImageToTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        keys: Tensor,
        image_pe: Tensor,
        folded: Tensor,
        bias: Tensor,
        values: Tensor,
        num_heads: int,
    ) -> Tensor:
        scores = products(folded, keys.mT).add_(bias[..., None])
        # Over few tokens, along the image: this vectorises.
        shares = scores.unflatten(1, (num_heads, -1)).softmax(dim=2).flatten(1, 2)
        ctx.num_heads = num_heads
        ctx.save_for_backward(image_pe, keys, folded, values, shares)
        return add_products(image, shares.mT, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _refuse_gradients_of_gradients()
        image_pe, keys, folded, values, shares = ctx.saved_tensors
        of_shares = products(values, gradient.mT).unflatten(1, (ctx.num_heads, -1))
        by_head = shares.view_as(of_shares)
        of_scores = _softmax_gradient(of_shares, by_head, dim=2).flatten(1, 2)
        return (
            add_products(gradient, of_scores.mT, folded),
            None,
            _position_gradient(ctx.needs_input_grad[2], image_pe, of_scores.mT, folded),
            products(of_scores, keys),
            of_scores.sum(dim=2),
            products(shares, gradient),
            None,
        )


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, image_index: Tensor, weights: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(image_index, weights, rows)
        ctx.num_images = len(images)
        return add_products(images.index_select(0, image_index), weights.mT, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _refuse_gradients_of_gradients()
        image_index, weights, rows = ctx.saved_tensors
        of_images = None
        if ctx.needs_input_grad[0]:
            of_images = gradient.new_zeros(ctx.num_images, *gradient.shape[1:])
            of_images.index_add_(0, image_index, gradient)
        return of_images, None, products(rows, gradient.mT), products(weights, gradient)
