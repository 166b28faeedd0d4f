"""The looks between a few tokens and thousands of image tokens, written out with their gradients.

On a CPU, sums and copies of the image's size cost as much as the products between them. By hand, position
codes have no gradient to be summed, and what a look adds to the image tokens' gradient is one product that
starts from the gradient so far.

Shapes: P prompts, L image tokens, C channels, R rows of a prompt: tokens x heads, tokens outermost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam_train.models import compiled
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
        num_heads: a head's rows, one a token, have shares that sum to one.

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


def is_in_turn(image_index: Tensor, num_images: int) -> bool:
    """Whether each image has as many prompts, and one image's come after the other's."""
    each = len(image_index) // max(1, num_images)
    numbers = torch.arange(num_images, device=image_index.device).repeat_interleave(each)
    return each > 0 and torch.equal(numbers, image_index)


def _softmax_of_tokens(scores: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of (P, T, heads, L) scores and (P, T, heads) biases, over the tokens; the scores may be written over."""
    if compiled.takes(scores) and scores.is_contiguous():
        bias = scores.new_zeros(scores.shape[:3]) if bias is None else bias.contiguous()
        return compiled.softmax_of_tokens(scores, bias)
    # Over few tokens, along the image: this vectorises.
    return (scores if bias is None else scores.add_(bias[..., None])).softmax(dim=1)


def _of_scores(of_shares: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the scores, over that of their softmax, and of the biases."""
    if compiled.takes(of_shares, shares):
        return compiled.softmax_of_tokens_back(of_shares, shares)
    of_scores = _softmax_gradient(of_shares, shares, dim=1)
    return of_scores, of_scores.sum(dim=-1)


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
        scores = products(folded, keys.mT).unflatten(1, (-1, num_heads))
        shares = _softmax_of_tokens(scores, bias.reshape(scores.shape[:3])).flatten(1, 2)
        ctx.num_heads = num_heads
        ctx.save_for_backward(image_pe, keys, folded, values, shares)
        return add_products(image, shares.mT, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _refuse_gradients_of_gradients()
        image_pe, keys, folded, values, shares = ctx.saved_tensors
        of_shares = products(values, gradient.mT).unflatten(1, (-1, ctx.num_heads))
        of_scores, of_bias = _of_scores(of_shares, shares.view_as(of_shares))
        of_scores = of_scores.flatten(1, 2)
        return (
            add_products(gradient, of_scores.mT, folded),
            None,
            _position_gradient(ctx.needs_input_grad[2], image_pe, of_scores.mT, folded),
            products(of_scores, keys),
            of_bias.flatten(1),
            products(shares, gradient),
            None,
        )


class SoftmaxOfTokens(torch.autograd.Function):
    """Of (P, T, heads, L) scores over the tokens; the scores, which nothing else may need, are written over."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        shares = _softmax_of_tokens(scores)
        if shares is scores:
            ctx.mark_dirty(scores)
        ctx.save_for_backward(shares)
        return shares

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _refuse_gradients_of_gradients()
        (shares,) = ctx.saved_tensors
        return _of_scores(gradient.clone(memory_format=torch.contiguous_format), shares)[0]


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, image_index: Tensor, weights: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(image_index, weights, rows)
        ctx.num_images = len(images)
        if is_in_turn(image_index, len(images)):
            out = products(weights.mT, rows)
            out.unflatten(0, (len(images), -1)).add_(images[:, None])
            return out
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
