"""The image tokens of many prompts at one image, without a copy of the image for each prompt.

All through the two-way transformer, the L image tokens of a prompt, of C channels, are

    scale * (image + weights^T rows) + offset

`image` (L, C) and `offset` (C,) are the same for all prompts. `scale` (L,) comes of the layer norms, and
`weights` (R, L) and `rows` (R, C) of what the prompt has added: R = heads x tokens for each look of the
image at the tokens, far fewer than C. A layer norm stays within the form, since centring and gains act on
image and rows alike, and its variance is a quadratic form in the weights. So what is projected is the image,
once, and a few rows; docs/fast_paths.md has the algebra. `TwoWayTransformer.forward` gives the same answers
token by token.

Shapes: P prompts, L image tokens, C channels, H heads of width d, T tokens, R rows of a prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.products import bmm, linear
from sam_train.models.two_way_transformer import (
    Attention,
    TwoWayTransformer,
)


class _Sight(NamedTuple):
    """One projection of the image tokens: scale * shared + fixed, and weight on a prompt's rows.

    Attributes:
        weight: (H, d, C).
        shared: (H, d, L), of the image.
        fixed: (H, d, L) of position code, offset and bias; (H, d, 1) of the latter alone; None if `shared`
            holds it already, before the first norm.
    """

    weight: Tensor
    shared: Tensor
    fixed: Tensor | None


class _Norm(NamedTuple):
    """What a layer norm of the image tokens needs: image and directions, centred over the channels.

    Attributes:
        square: (L,) of the image.
        crosses: its products with the directions, (H, d, L) or (R, L) each.
        directions: (H, d, C) for an attention's values, (R, C) for rows that all prompts share.
    """

    square: Tensor
    crosses: list[Tensor]
    directions: list[Tensor]


class _Stage(NamedTuple):
    """The image between two norms, as the attentions of a layer see it."""

    keys: _Sight
    values: _Sight
    queries: _Sight | None
    directions: list[Tensor]
    norm: _Norm | None


class Own(NamedTuple):
    """What is a prompt's own: weights (P, R, L), rows (P, R, C) and the scale's -2nd power (P, 1, L)."""

    weights: Tensor
    rows: Tensor
    variance: Tensor | None

    @property
    def scale(self) -> Tensor | None:
        return None if self.variance is None else self.variance.rsqrt()


class PositionSights:
    """What the attentions see of position codes and offsets: the same for all images.

    Args:
        transformer: whose image side it is.
        image_pe: (L, C).
    """

    def __init__(self, transformer: TwoWayTransformer, image_pe: Tensor) -> None:
        seen, self.queries, self.keys = image_pe.T, [], []
        for layer in transformer.blocks():
            looks, looked = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            self.keys.append(_by_heads(looks, linear(looks.k_proj.weight, seen.T)))
            queries = linear(looked.q_proj.weight, seen.T) + looked.q_proj.bias[:, None]
            self.queries.append(_by_heads(looked, queries))
            seen = image_pe.T + layer.norm4.bias[:, None]
        last = transformer.final_attn_token_to_image
        # A key's bias adds the same to every score of a query, which the softmax takes out again.
        self.keys.append(_by_heads(last, linear(last.k_proj.weight, seen.T)))


class SharedImage:
    """One image, projected once for all prompts at it.

    Args:
        transformer: as of whose weights.
        image: (L, C), with what all prompts' dense embeddings share.
        positions: of the same transformer.
        cell_rows: (K, C): the prompts' dense embeddings are these rows by weights of each prompt.
    """

    def __init__(
        self,
        transformer: TwoWayTransformer,
        image: Tensor,
        positions: PositionSights,
        cell_rows: Tensor | None = None,
    ) -> None:
        self.transformer = transformer
        self.stages: list[_Stage] = []
        directions = [] if cell_rows is None else [cell_rows]
        offset: Tensor | None = None
        for number, layer in enumerate(transformer.blocks()):
            looks, looked = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            fixed_keys, fixed_queries = positions.keys[number], positions.queries[number]
            keys, values = _sights(looks, image, fixed_keys, offset)
            queries = _sight(looked, looked.q_proj, image, fixed_queries, is_first=offset is None)
            seen = directions
            directions = [*directions, _by_heads(looked, looked.out_proj.weight.T)]
            # The values' bias, weighted by shares that sum to one, is the same for all: where it and the
            # image cancel, they do so here and not in sums of squares, which would lose the digits.
            bias = F.linear(looked.v_proj.bias, looked.out_proj.weight, looked.out_proj.bias)
            if offset is None:
                image = image + bias
            else:
                directions.append((offset + bias)[None])
            image, directions = _centred(image), [_centred(rows) for rows in directions]
            crosses = [linear(rows, image) for rows in directions]
            norm = _Norm(image.square().sum(dim=1), crosses, directions)
            self.stages.append(_Stage(keys, values, queries, seen, norm))
            gain, offset = layer.norm4.weight, layer.norm4.bias
            image, directions = image * gain, [rows * gain for rows in directions]
        last = transformer.final_attn_token_to_image
        keys, values = _sights(last, image, positions.keys[-1], offset)
        self.stages.append(_Stage(keys, values, None, directions, None))
        self.image, self.offset = image, offset

    def __call__(
        self, point_embedding: Tensor, cell_weights: Tensor | None = None
    ) -> tuple[Tensor, Own]:
        """`TwoWayTransformer.forward` for (P, T, C) tokens and (P, K, L) weights of the cell rows.

        Returns:
            The tokens (P, T, C) and what is the prompts' own in the image tokens.
        """
        queries, weights = point_embedding, cell_weights
        variance: Tensor | None = None
        values: list[Tensor | None] = [] if cell_weights is None else [None]
        for layer, stage in zip(self.transformer.blocks(), self.stages[:-1], strict=True):
            own = _own(weights, stage.directions, values, variance)
            queries = layer.attend_to_each_other(queries, point_embedding)
            looks = layer.cross_attn_token_to_image
            attended = _look(looks, queries + point_embedding, stage, own)
            queries = layer.update(queries, attended)
            looked = layer.cross_attn_image_to_token
            assert stage.queries is not None and stage.norm is not None
            keys = looked.split(looked.k_proj(queries + point_embedding)).transpose(1, 2)
            shares = _scores(looked.scale * keys, stage.queries, own).softmax(dim=2).flatten(1, 2)
            unbiased = linear(queries, looked.v_proj.weight)
            values.append(looked.split(unbiased).transpose(1, 2))
            parts = [] if weights is None else [weights]
            if variance is None:
                parts.append(shares)
            else:
                # Within the brackets of the form, what is added now is not scaled yet.
                unscale = variance.sqrt()
                parts += [shares * unscale, unscale]
                values.append(None)
            weights = torch.cat(parts, dim=1) if len(parts) > 1 else shares
            variance = _variance(weights, stage.norm, values, variance, layer.norm4.eps)
        assert weights is not None
        own = _own(weights, self.stages[-1].directions, values, variance)
        assert own is not None
        last = self.transformer.final_attn_token_to_image
        attended = _look(last, queries + point_embedding, self.stages[-1], own)
        return self.transformer.norm_final_attn(queries + attended), own


class SharedLinear:
    """A linear layer of the image tokens that the transformer leaves, projected once for all prompts.

    Args:
        image: whose tokens.
        weight: (O, C).
        bias: (O,).
    """

    def __init__(self, image: SharedImage, weight: Tensor, bias: Tensor) -> None:
        assert image.offset is not None
        self.weight = weight
        self.shared = linear(image.image, weight)
        self.offset = F.linear(image.offset, weight, bias)

    def __call__(self, own: Own) -> Tensor:
        """(P, L, O)."""
        assert own.scale is not None
        out = _plus(bmm(own.weights.mT, linear(own.rows, self.weight)), self.shared)
        return torch.addcmul(self.offset, out, own.scale.mT)


def _by_heads(attention: Attention, x: Tensor) -> Tensor:
    """(H * d, ...) to (H, d, ...)."""
    return x.unflatten(0, (attention.num_heads, -1))


def _plus(x: Tensor, y: Tensor) -> Tensor:
    """Their sum; in the place of `x` where no gradient could miss it."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


def _sight(
    attention: Attention, layer: nn.Linear, image: Tensor, fixed: Tensor, *, is_first: bool
) -> _Sight:
    shared = _by_heads(attention, linear(layer.weight, image))
    weight = _by_heads(attention, layer.weight)
    return _Sight(weight, shared + fixed, None) if is_first else _Sight(weight, shared, fixed)


def _sights(
    attention: Attention, image: Tensor, fixed: Tensor, offset: Tensor | None
) -> tuple[_Sight, _Sight]:
    """The keys and values of an attention that looks at the image; values know no position."""
    is_first = offset is None
    keys = _sight(attention, attention.k_proj, image, fixed, is_first=is_first)
    layer = attention.v_proj
    bias = layer.bias if offset is None else F.linear(offset, layer.weight, layer.bias)
    constant = _by_heads(attention, bias)[..., None]
    # Added when the values are weighted, whose weights sum to one.
    shared = _by_heads(attention, linear(layer.weight, image))
    return keys, _Sight(_by_heads(attention, layer.weight), shared, constant)


def _own(
    weights: Tensor | None,
    directions: list[Tensor],
    values: list[Tensor | None],
    variance: Tensor | None,
) -> Own | None:
    if weights is None:
        return None
    return Own(weights, _rows(directions, values, len(weights)), variance)


def _rows(directions: list[Tensor], values: list[Tensor | None], num_prompts: int) -> Tensor:
    """(P, R, C): the values (P, H, T, d) along the directions of their heads, and shared rows."""
    blocks = [
        rows.expand(num_prompts, -1, -1)
        if value is None
        else torch.einsum("phtd,hdc->phtc", value, rows).flatten(1, 2)
        for rows, value in zip(directions, values, strict=True)
    ]
    return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]


def _of_all_heads(tokens: Tensor, image: Tensor) -> Tensor:
    """(P, H, T, d) tokens by the (H, d, L) image that prompts share: (P, H, T, L), heads outermost."""
    num_prompts, _, num_tokens, _ = tokens.shape
    product = tokens.transpose(0, 1).flatten(1, 2) @ image
    return product.unflatten(1, (num_prompts, num_tokens)).transpose(0, 1)


def _scores(tokens: Tensor, sight: _Sight, own: Own | None) -> Tensor:
    """(P, H, T, d) scaled tokens against the projected image tokens: (P, H, T, L)."""
    shared = _of_all_heads(tokens, sight.shared)
    if own is None:
        return shared
    folded = torch.einsum("phtd,hdc->phtc", tokens, sight.weight).flatten(1, 2)
    scores = bmm(bmm(folded, own.rows.mT), own.weights).unflatten(1, tokens.shape[1:3])
    scores = _plus(scores, shared)
    if own.scale is None:
        return scores
    assert sight.fixed is not None
    return torch.addcmul(_of_all_heads(tokens, sight.fixed), scores, own.scale[:, None])


def _look(attention: Attention, tokens: Tensor, stage: _Stage, own: Own | None) -> Tensor:
    """The tokens (P, T, C) look at the image: what they take from it, (P, T, C)."""
    queries = attention.split(attention.q_proj(tokens)).transpose(1, 2)
    num_prompts, num_heads, num_tokens, _ = queries.shape
    values = stage.values
    if own is None:
        pooled = F.scaled_dot_product_attention(
            queries.transpose(0, 1).flatten(1, 2)[None],
            stage.keys.shared.mT[None],
            values.shared.mT[None],
        )[0].unflatten(1, (num_prompts, num_tokens))
        pooled = pooled.permute(1, 2, 0, 3)
    else:
        shares = _scores(attention.scale * queries, stage.keys, own).softmax(dim=-1)
        if own.scale is not None:
            shares = shares * own.scale[:, None]
        pooled = shares.transpose(0, 1).flatten(1, 2) @ values.shared.mT
        pooled = pooled.unflatten(1, (num_prompts, num_tokens)).permute(1, 2, 0, 3)
        of_rows = bmm(bmm(shares.flatten(1, 2), own.weights.mT), own.rows)
        of_rows = of_rows.unflatten(1, (num_heads, num_tokens))
        pooled = pooled + torch.einsum("phtc,hdc->pthd", of_rows, values.weight)
    assert values.fixed is not None
    return attention.out_proj((pooled + values.fixed[..., 0]).flatten(2))


def _variance(
    weights: Tensor,
    norm: _Norm,
    values: list[Tensor | None],
    before: Tensor | None,
    eps: float,
) -> Tensor:
    """The scale's -2nd power after a layer norm: (P, 1, L)."""
    rows = _rows(norm.directions, values, len(weights))
    crosses = [
        cross.expand(len(weights), -1, -1)
        if value is None
        else _of_all_heads(value, cross).flatten(1, 2)
        for cross, value in zip(norm.crosses, values, strict=True)
    ]
    cross = torch.cat(crosses, dim=1) if len(crosses) > 1 else crosses[0]
    along = _plus(bmm(bmm(rows, rows.mT), weights), 2 * cross)
    square = (weights * along).sum(dim=1, keepdim=True) + norm.square
    # The norm before has scaled its input, and with it the epsilon's share.
    floor = eps if before is None else eps * before
    return square.clamp(min=0) / rows.shape[-1] + floor
