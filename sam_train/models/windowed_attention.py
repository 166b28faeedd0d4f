"""Attention in windows with decomposed relative positions on the CPU, in pieces that stay in the cache.

scores[q, k] = scale * q . k + along_rows[q, row of k] + along_columns[q, column of k]

Scores and biases of 64 x 64 tokens are 67 MB a head each. Here those of a few queries, or of a few windows,
are made and used at a time, in memory that the next ones take over, and made again in the backward pass. A
compiled loop adds the two sums as it softens the scores (`compiled.soften`). Where there is none, in
small windows the two sums join the dot product: queries grow by what they give to each row and column, keys
by which row and column they are in. In large ones torch's kernel gets the sums as a mask. Padding is a key
alone: it asks nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor

from sam_train.models import compiled
from sam_train.models.products import is_on_cpu_now, is_plain_cpu, products
from sam_train.models.rel_pos_attention import attend_in_windows
from sam_train.models.window_grids import Grids, put
from sam_train.models.windows import regions

MIN_TOKENS_IN_HALVES = 512
"""From so many tokens on, bfloat16 is taken without compiled loops too; torch has kernels for fewer."""


def attends_in_pieces(x: Tensor, num_tokens: int) -> bool:
    """Whether `windowed_attention` is for such tensors, here and now, in windows of so many tokens."""
    is_half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if is_half and (num_tokens > MIN_TOKENS_IN_HALVES or compiled.takes_bf16(x)):
        return is_on_cpu_now(x) and x.dtype in (torch.bfloat16, torch.float32)
    return is_plain_cpu(x)


def windowed_attention(
    qkv: Tensor, rel_pos: tuple[Tensor, Tensor], window: tuple[int, int], padding: Tensor | None
) -> Tensor:
    """Attends within windows, of which those at the right and the bottom may be padded.

    Args:
        qkv: (N, H, W, 3, heads, d), queries, keys and values.
        rel_pos: embeddings of vertical and horizontal distances in a window (h, w): (2h - 1, d) and
            (2w - 1, d), or of another length, which is interpolated.
        window: (h, w).
        padding: (3, heads, d), what padding is; needed where (h, w) do not divide (H, W).

    Returns:
        (N, H, W, heads * d).
    """
    if padding is not None:
        padding = padding.to(qkv.dtype)
    return _WindowedAttention.apply(qkv, _table(rel_pos, window).to(qkv.dtype), padding, window)


def windowed_answers(
    qkv: Tensor,
    rel_pos: tuple[Tensor, Tensor],
    window: tuple[int, int],
    padding: Tensor | None,
    query_bias: Tensor,
) -> Tensor:
    """`windowed_attention` without gradients, of queries that a bias (heads, d) is yet to be added to."""
    table = _table(rel_pos, window).to(qkv.dtype)
    return _answers(qkv, table, padding, window, query_bias).flatten(3)


def _table(rel_pos: tuple[Tensor, Tensor], window: tuple[int, int]) -> Tensor:
    """The embeddings of all offsets of rows, then of columns: (2h - 1 + 2w - 1, d)."""
    sides = zip(window, rel_pos, strict=True)
    return torch.cat([_of_offsets(get_rel_pos(side, side, table)) for side, table in sides])


def _of_offsets(table: Tensor) -> Tensor:
    """(side, side, d) of queries and keys to (2 side - 1, d) of key minus query, ascending."""
    return torch.cat([table[1:, 0].flip(0), table[0]])


def _answers(
    qkv: Tensor,
    table: Tensor,
    padding: Tensor | None,
    window: tuple[int, int],
    query_bias: Tensor | None = None,
) -> Tensor:
    """(N, H, W, heads, d)."""
    num_heads, d = qkv.shape[4:]
    out = qkv.new_empty(*qkv.shape[:3], num_heads, d)
    with torch.autocast("cpu", enabled=False):
        for region in regions((qkv.shape[1], qkv.shape[2]), window):
            grids = Grids(region, qkv, table, padding, window, query_bias)
            view = region.of(out)
            view.copy_(grids.answers().view(view.shape))
    return out


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        table: Tensor,
        padding: Tensor | None,
        window: tuple[int, int],
    ) -> Tensor:
        out = _answers(qkv, table, padding, window)
        ctx.save_for_backward(qkv, table, padding, out)
        ctx.window = window
        return out.flatten(3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, table, padding, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradients(qkv, table, padding, ctx.window, gradient)
        gradient = gradient.reshape(out.shape)
        exact = torch.promote_types(qkv.dtype, torch.float32)
        of_qkv = torch.empty_like(qkv)
        of_table = torch.zeros_like(table, dtype=exact)
        of_padding = None if padding is None else torch.zeros_like(padding, dtype=exact)
        with torch.autocast("cpu", enabled=False):
            for region in regions((qkv.shape[1], qkv.shape[2]), ctx.window):
                grids = Grids(region, qkv, table, padding, ctx.window)
                of_queries, of_keys, of_values = _gradients(
                    grids, region.of(gradient), region.of(out), of_table
                )
                of_grids = (of_queries, of_keys, of_values)
                for number, (view, of_tokens) in enumerate(
                    zip(of_qkv.unbind(3), of_grids, strict=True)
                ):
                    view, side = region.of(view), region.asked if number == 0 else ctx.window
                    of_windows = of_tokens.unflatten(1, side).unflatten(0, grids.shape)
                    h, w = region.asked
                    view.copy_(of_windows[..., :h, :w, : view.shape[-1]])
                    if of_padding is not None and number > 0:
                        for part in grids.padding_of(of_windows[..., : view.shape[-1]]):
                            of_padding[number] += part.sum(dim=(0, 1, 2, 4, 5))
        return (
            of_qkv,
            of_table.to(table.dtype),
            None if of_padding is None else of_padding.to(qkv.dtype),
            None,
        )


def _differentiable_gradients(
    qkv: Tensor,
    table: Tensor,
    padding: Tensor | None,
    window: tuple[int, int],
    gradient: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients that have gradients themselves, by torch's kernels."""
    # Detached from what comes before, but for the graph of the gradients.
    inputs = [x if x is None else x.view_as(x) for x in (qkv, table, padding)]
    again, of_offsets, padded = inputs
    assert again is not None and of_offsets is not None
    num_rows = 2 * window[0] - 1
    rel_pos = (of_offsets[:num_rows].flip(0), of_offsets[num_rows:].flip(0))
    out = attend_in_windows(again, rel_pos, window, padded)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True))
    grads = [next(found) if x is not None and x.requires_grad else None for x in inputs]
    return *grads, None


def _gradients(
    grids: Grids, gradient: Tensor, answers: Tensor, of_table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a region's queries, keys and values; the table's are added to it.

    Args:
        gradient, answers: (N, above, beside, heads, h', w', d).
        of_table: (2h - 1 + 2w - 1, d).
    """
    d, h = gradient.shape[-1], grids.window[0]
    exact = of_table.dtype
    means: Tensor | None = None
    if not grids.is_compiled:
        # The softmax's own term, one number a query.
        means = (gradient * answers).sum(dim=-1, dtype=exact).reshape(*grids.queries.shape[:2], 1)
    gradient = gradient.contiguous().view(grids.queries.shape)
    of_queries = torch.empty_like(grids.queries, dtype=exact)
    # Queries of a head that come in several pieces add to its keys and values.
    adds = grids.size_of_piece[1] < grids.region.asked[0]
    make = torch.zeros_like if adds else torch.empty_like
    of_keys, of_values = (make(x, dtype=exact) for x in (grids.values, grids.values))
    for piece in grids.pieces():
        (shares, factors), pull = grids.shares(piece), grids.of_piece(gradient, piece)
        heads, queries = piece.heads, grids.of_piece(grids.queries, piece)
        weighed = pull if factors is None else (pull * factors).to(pull.dtype)
        put(of_values[heads], shares.to(pull.dtype).mT, weighed, adds=adds)
        errors = products(pull, grids.values[heads].mT).to(shares.dtype)
        of_piece = None if means is None else grids.of_piece(means, piece)
        errors, of_along = grids.of_scores(errors, shares, factors, of_piece, piece)
        rounded = errors.to(pull.dtype)
        put(of_keys[heads], rounded.mT, queries, adds=adds)
        back = products(rounded, grids.keys[heads])
        if of_along is None:
            of_along = of_table.new_zeros(*queries.shape[:2], len(of_table))
            of_rows, of_columns = grids.by_keys(of_along, piece.rows.start)
            of_places = back.view(*of_rows.shape[:3], -1)[..., d:]
            of_rows.copy_(of_places[..., :h])
            of_columns.copy_(of_places[..., h:])
        of_along = of_along.to(pull.dtype).flatten(0, 1)
        by_table = (of_along @ grids.table).view(queries.shape)
        torch.add(back[..., :d], by_table, out=grids.of_piece(of_queries, piece))
        of_table += of_along.mT @ queries.reshape(-1, d)
    return of_queries, of_keys.mul_(grids.scale), of_values
