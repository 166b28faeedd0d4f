"""Attention with decomposed relative positions, whose scores are never stored (Li et al. 2022, ViTDet).

scores[q, k] = scale * q . k + along_rows[q, row of k] + along_columns[q, column of k]

For 64 x 64 tokens, scores and biases are 67 MB a head each. On the CPU a few queries at a time are scored,
softened and weighted while they are in the cache, and scored again in the backward pass; of bfloat16 the
scores are added up and softened in float32.
Elsewhere the two sums join the dot product: queries grow by their biases, keys by which row and column they
are in, so that attention kernels that know no such bias apply.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor
from torch.autograd.function import once_differentiable

from sam_train.models.products import is_on_cpu_now, is_plain_cpu, products, takes_products

CACHE_FLOATS = 1 << 20
"""Scores that are worked on at a time."""
STORED_TOKENS = 512
"""Up to so many tokens, the bias is kept as a matrix by other devices, and where MKL is preferred."""


def rel_pos_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rel_pos: tuple[Tensor, Tensor],
    size: tuple[int, int],
) -> Tensor:
    """Attends within an (h, w) grid of tokens.

    Args:
        queries, keys, values: (B, h * w, d), B heads.
        rel_pos: embeddings of vertical and horizontal distances, (2h - 1, d) and (2w - 1, d), or of
            another length, which is interpolated.
        size: (h, w).

    Returns:
        (B, h * w, d).
    """
    (h, w), grid = size, queries.unflatten(1, size)
    along_rows = torch.einsum("bhwc,hkc->bhwk", grid, get_rel_pos(h, h, rel_pos[0])).flatten(1, 2)
    along_columns = torch.einsum("bhwc,wkc->bhwk", grid, get_rel_pos(w, w, rel_pos[1])).flatten(
        1, 2
    )
    if _goes_in_pieces(queries):
        # Heads that lie between one another are packed once, not for every few queries.
        tokens = (x.contiguous() for x in (queries, keys, values))
        return _Attention.apply(*tokens, along_rows, along_columns)
    if h * w <= STORED_TOKENS or (not torch.compiler.is_compiling() and torch._C._is_tracing()):
        bias = along_rows[..., None] + along_columns[..., None, :]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.flatten(2))
    rows = torch.eye(h, dtype=keys.dtype, device=keys.device).repeat_interleave(w, dim=0)
    columns = torch.eye(w, dtype=keys.dtype, device=keys.device).repeat(h, 1)
    places = torch.cat([rows, columns], dim=1).expand(len(keys), -1, -1)
    scale = queries.shape[-1] ** -0.5
    queries = torch.cat([scale * queries, along_rows, along_columns], dim=2)
    return F.scaled_dot_product_attention(
        queries[None], torch.cat([keys, places], dim=2)[None], values[None], scale=1.0
    )[0]


def _goes_in_pieces(queries: Tensor) -> bool:
    has_many = queries.shape[1] > STORED_TOKENS
    if is_plain_cpu(queries):
        return has_many or takes_products(queries)
    return has_many and queries.dtype == torch.bfloat16 and is_on_cpu_now(queries)


class _Attention(torch.autograd.Function):
    """A few queries of a head at a time, or a few heads where they have few queries."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        queries, _, values, *_ = inputs
        out = torch.empty_like(values)
        for heads, rows in _pieces(*queries.shape[:2]):
            shares = _shares(inputs, heads, rows)
            out[heads, rows] = products(shares.to(values.dtype), values[heads])
        ctx.save_for_backward(*inputs, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        *inputs, out = ctx.saved_tensors
        queries, keys, values, along_rows, along_columns = inputs
        grads = tuple(
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs
        )
        of_queries, of_keys, of_values, of_rows, of_columns = grads
        scale = queries.shape[-1] ** -0.5
        # The softmax's own term is one number a query.
        means = (gradient * out).sum(dim=-1, keepdim=True, dtype=of_rows.dtype)
        for heads, rows in _pieces(*queries.shape[:2]):
            shares, pull = _shares(inputs, heads, rows), gradient[heads, rows]
            of_values[heads] += products(shares.to(pull.dtype).mT, pull)
            errors = products(pull, values[heads].mT).to(shares.dtype)
            errors.sub_(means[heads, rows]).mul_(shares)
            grid = errors.unflatten(2, (along_rows.shape[-1], -1))
            torch.sum(grid, dim=3, out=of_rows[heads, rows])
            torch.sum(grid, dim=2, out=of_columns[heads, rows])
            errors = errors.to(pull.dtype)
            torch.mul(products(errors, keys[heads]), scale, out=of_queries[heads, rows])
            of_keys[heads] += scale * products(errors.mT, queries[heads, rows])
        return tuple(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))


def _pieces(num_heads: int, num_tokens: int) -> list[tuple[slice, slice]]:
    """Heads and queries whose scores are worked on at a time."""
    num_rows = max(1, CACHE_FLOATS // num_tokens)
    if num_rows < num_tokens:
        # Whole heads do not fit.
        return [
            (slice(head, head + 1), slice(start, start + num_rows))
            for head in range(num_heads)
            for start in range(0, num_tokens, num_rows)
        ]
    step = num_rows // num_tokens
    return [(slice(start, start + step), slice(None)) for start in range(0, num_heads, step)]


def _shares(inputs: Any, heads: slice, rows: slice) -> Tensor:
    """Each query's weights of the values: (B', R, L), float32 for bfloat16."""
    queries, keys, _, along_rows, along_columns = inputs
    scaled = queries[heads, rows] * queries.shape[-1] ** -0.5
    scores = products(scaled, keys[heads].mT).unflatten(2, (along_rows.shape[-1], -1))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores += along_rows[heads, rows][..., None]
    scores += along_columns[heads, rows][..., None, :]
    return torch.softmax(scores.flatten(2), dim=-1)
