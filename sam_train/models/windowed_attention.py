"""Attention in windows with decomposed relative positions on the CPU, in pieces that stay in the cache.

scores[q, k] = scale * q . k + along_rows[q, row of k] + along_columns[q, column of k]

Scores and biases of 64 x 64 tokens are 67 MB a head each. Here those of a few queries, or of a few windows,
are made and used at a time, in memory that the next ones take over, and made again in the backward pass. In
small windows the two sums join the dot product: queries grow by what they give to each row and column, keys
by which row and column they are in. In large ones torch's kernel gets the sums as a mask. Padding is a key
alone: it asks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor

from sam_train.models.products import is_on_cpu_now, is_plain_cpu, products
from sam_train.models.rel_pos_attention import attend_in_windows
from sam_train.models.windows import Region, regions

CACHE_FLOATS = 1 << 20
"""Scores that are worked on at a time."""
MAX_GROWN = 0.6
"""Queries and keys grow by rows and columns up to so many of these for a channel: 14 + 14 for 64."""
KERNEL_QUERIES = 1024
"""Queries of a head that torch's kernel gets at a time, with a quarter of them for each of four threads."""
MAX_BIASES = 1 << 26
"""Biases that are made at a time, unless those of one head are more."""
MIN_TOKENS_IN_HALVES = 512
"""From so many tokens on, bfloat16 is taken too, which has kernels of its own for fewer."""


def attends_in_pieces(x: Tensor, num_tokens: int) -> bool:
    """Whether `windowed_attention` is for such tensors, here and now, in windows of so many tokens."""
    is_half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if is_half and num_tokens > MIN_TOKENS_IN_HALVES:
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
    tables = [
        _of_offsets(get_rel_pos(side, side, table))
        for side, table in zip(window, rel_pos, strict=True)
    ]
    table = torch.cat(tables).to(qkv.dtype)
    if padding is not None:
        padding = padding.to(qkv.dtype)
    return _WindowedAttention.apply(qkv, table, padding, window)


def _of_offsets(table: Tensor) -> Tensor:
    """(side, side, d) of queries and keys to (2 side - 1, d) of key minus query, ascending."""
    return torch.cat([table[1:, 0].flip(0), table[0]])


class _Piece(NamedTuple):
    """Heads (of windows) and rows of queries whose scores are worked on at a time."""

    heads: slice
    rows: slice


class _Grids:
    """The windows of a region, head by head: (n, tokens, ...).

    Attributes:
        queries: (n, h' * w', d).
        keys: (n, h * w, d), scaled, or grown by their rows and columns: (n, h * w, d + h + w).
        values: (n, h * w, d).
    """

    def __init__(
        self,
        region: Region,
        qkv: Tensor,
        table: Tensor,
        padding: Tensor | None,
        window: tuple[int, int],
    ) -> None:
        self.region, self.window = region, window
        self.scale, self.table = qkv.shape[-1] ** -0.5, table
        h, w = window
        self.is_grown = table.dtype != torch.bfloat16 and h + w <= MAX_GROWN * qkv.shape[-1]
        queries, keys, values = (region.of(x) for x in qkv.unbind(3))
        self.shape = queries.shape[:4]
        num_heads = math.prod(self.shape)
        num_asked = region.asked[0] * region.asked[1]
        self.queries = queries.reshape(num_heads, num_asked, qkv.shape[-1])
        padding_of = (None, None) if padding is None else (padding[1], padding[2])
        self.keys = self._padded(keys, padding_of[0], h + w if self.is_grown else 0)
        self.keys[..., : qkv.shape[-1]] *= self.scale
        self.values = self._padded(values, padding_of[1], 0)
        if self.is_grown:
            places = self.keys.unflatten(1, window)[..., qkv.shape[-1] :]
            places[..., :h] = torch.eye(h, dtype=table.dtype)[:, None]
            places[..., h:] = torch.eye(w, dtype=table.dtype)
        self.size_of_piece = self._size_of_piece()
        most = self.size_of_piece[0] * self.size_of_piece[1] * region.asked[1]
        exact = torch.promote_types(table.dtype, torch.float32)
        # Every piece's in turn: fresh memory would be paid for in page faults.
        self._scores = table.new_empty(most * h * w, dtype=exact)
        self._shares = torch.empty_like(self._scores)
        self._grown = table.new_empty(most * self.keys.shape[-1]) if self.is_grown else None

    def _padded(self, tokens: Tensor, padding: Tensor | None, num_more: int) -> Tensor:
        (h, w), (asked_h, asked_w), d = self.window, self.region.asked, tokens.shape[-1]
        out = tokens.new_empty(*self.shape, h, w, d + num_more)
        out[..., :asked_h, :asked_w, :d] = tokens
        if padding is not None:
            for part in self.padding_of(out):
                part[..., :d] = padding[:, None, None]
        return out.view(-1, h * w, d + num_more)

    def padding_of(self, grids: Tensor) -> Iterator[Tensor]:
        """The two parts of (N, above, beside, heads, h, w, c) that are no tokens of the image."""
        h, w = self.region.asked
        yield grids[..., h:, :, :]
        yield grids[..., :h, w:, :]

    def _size_of_piece(self) -> tuple[int, int]:
        """Heads and rows of a piece."""
        h, w = self.region.asked
        num_keys = self.keys.shape[1]
        num_heads = CACHE_FLOATS // (h * w * num_keys)
        if num_heads:
            return min(num_heads, max(1, len(self.keys))), h
        return 1, min(h, max(1, CACHE_FLOATS // (w * num_keys)))

    def pieces(self) -> Iterator[_Piece]:
        heads, rows = self.size_of_piece
        for head, row in product(
            range(0, len(self.keys), heads), range(0, self.region.asked[0], rows)
        ):
            yield _Piece(slice(head, head + heads), slice(row, row + rows))

    def of_piece(self, x: Tensor, piece: _Piece) -> Tensor:
        """A view of (n, h' * w', c): (heads, queries, c)."""
        width = self.region.asked[1]
        return x[piece.heads, piece.rows.start * width : piece.rows.stop * width]

    def along(self, queries: Tensor) -> Tensor:
        """(heads, queries, d) by every offset of rows and columns: (heads, queries, 2h - 1 + 2w - 1)."""
        num_heads, num_queries, d = queries.shape
        return (queries.reshape(-1, d) @ self.table.mT).view(num_heads, num_queries, -1)

    def by_keys(self, along: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
        """Views of `along`, by rows and columns of the keys: (heads, rows, w', h) and (heads, rows, w', w).

        A key's offset is its place less the query's: the next query's row of keys starts one sooner.
        """
        (h, w), width = self.window, self.region.asked[1]
        num_heads, num_queries, length = along.shape
        shape = (num_heads, num_queries // width, width)
        strides = (num_queries * length, width * length, length)
        start = along.storage_offset()
        rows = along.as_strided(
            (*shape, h), (strides[0], strides[1] - 1, strides[2], 1), start + h - 1 - first_row
        )
        columns = along.as_strided(
            (*shape, w), (strides[0], strides[1], strides[2] - 1, 1), start + 2 * h - 1 + w - 1
        )
        return rows, columns

    def answers(self) -> Tensor:
        """What the queries take: (n, h' * w', d)."""
        # Of bfloat16, torch's kernel makes up to three times the error.
        if not self.is_grown and self.queries.dtype != torch.bfloat16:
            return self._answers_of_kernel()
        out = torch.empty_like(self.queries)
        for piece in self.pieces():
            shares = self.shares(piece).to(out.dtype)
            products(shares, self.values[piece.heads], out=self.of_piece(out, piece))
        return out

    def _answers_of_kernel(self) -> Tensor:
        """The same by torch's kernel, with a place for the biases of the queries at hand."""
        (h, w), (num_rows, width) = self.window, self.region.asked
        rows = min(num_rows, -(-KERNEL_QUERIES // width))
        num_biases = rows * width * h * w
        at_once = min(len(self.keys), -(-torch.get_num_threads() // 4))
        heads = max(1, min(at_once, MAX_BIASES // num_biases))
        out = torch.empty_like(self.queries)
        biases = out.new_empty(
            heads * num_biases, dtype=torch.promote_types(out.dtype, torch.float32)
        )
        for head, row in product(range(0, len(self.keys), heads), range(0, num_rows, rows)):
            piece = _Piece(slice(head, head + heads), slice(row, row + rows))
            queries = self.of_piece(self.queries, piece)
            along_rows, along_columns = self.by_keys(self.along(queries), row)
            bias = biases[: along_rows[..., 0].numel() * h * w].view(*along_rows.shape[:3], h, w)
            torch.add(along_rows[..., None], along_columns[..., None, :], out=bias)
            keys, values = self.keys[piece.heads], self.values[piece.heads]
            answer = F.scaled_dot_product_attention(
                queries[None],
                keys[None],
                values[None],
                attn_mask=bias.view(1, *queries.shape[:2], h * w),
                scale=1.0,
            )
            self.of_piece(out, piece).copy_(answer[0])
        return out

    def shares(self, piece: _Piece) -> Tensor:
        """Each query's weights of the values: (heads, queries, h * w), float32 for bfloat16."""
        queries, keys = self.of_piece(self.queries, piece), self.keys[piece.heads]
        num_heads, num_queries, d = queries.shape
        rows, columns = self.by_keys(self.along(queries), piece.rows.start)
        scores = self._scores[: num_heads * num_queries * keys.shape[1]]
        scores = scores.view(num_heads, num_queries, -1)
        h, w = self.window
        if self._grown is not None:
            grown = self._grown[: num_heads * num_queries * keys.shape[2]]
            grown = grown.view(*rows.shape[:3], -1)
            grown[..., :d] = queries.view(*rows.shape[:3], d)
            grown[..., d : d + h] = rows
            grown[..., d + h :] = columns
            products(grown.flatten(1, 2), keys.mT, out=scores)
        else:
            _put(scores, queries, keys.mT)
            by_places = scores.view(*rows.shape[:3], h, w)
            by_places += rows[..., None]
            by_places += columns[..., None, :]
        shares = self._shares[: scores.numel()].view(scores.shape)
        return torch.softmax(scores, dim=-1, out=shares)


def _put(out: Tensor, a: Tensor, b: Tensor, *, adds: bool = False) -> None:
    """The batch of products into `out`, or onto it, whose precision may be the greater one."""
    if out.dtype == a.dtype and not adds:
        products(a, b, out=out)
    elif adds:
        out += products(a, b)
    else:
        out.copy_(products(a, b))


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        table: Tensor,
        padding: Tensor | None,
        window: tuple[int, int],
    ) -> Tensor:
        num_heads, d = qkv.shape[4:]
        out = qkv.new_empty(*qkv.shape[:3], num_heads, d)
        with torch.autocast("cpu", enabled=False):
            for region in regions((qkv.shape[1], qkv.shape[2]), window):
                grids = _Grids(region, qkv, table, padding, window)
                view = region.of(out)
                view.copy_(grids.answers().view(view.shape))
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
        # The softmax's own term is one number a query.
        means = (gradient * out).sum(dim=-1, keepdim=True, dtype=exact)
        of_qkv = torch.empty_like(qkv)
        of_table = torch.zeros_like(table, dtype=exact)
        of_padding = None if padding is None else torch.zeros_like(padding, dtype=exact)
        with torch.autocast("cpu", enabled=False):
            for region in regions((qkv.shape[1], qkv.shape[2]), ctx.window):
                grids = _Grids(region, qkv, table, padding, ctx.window)
                of_queries, of_keys, of_values = _gradients(
                    grids, region.of(gradient), region.of(means), of_table
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
    grids: _Grids, gradient: Tensor, means: Tensor, of_table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a region's queries, keys and values; the table's are added to it.

    Args:
        gradient: of the answers, (N, above, beside, heads, h', w', d).
        means: its products with them, (..., 1).
        of_table: (2h - 1 + 2w - 1, d).
    """
    d, (h, w) = gradient.shape[-1], grids.window
    exact = of_table.dtype
    gradient = gradient.contiguous().view(grids.queries.shape)
    means = means.contiguous().view(*gradient.shape[:2], 1)
    of_queries = torch.empty_like(grids.queries, dtype=exact)
    # Queries of a head that come in several pieces add to its keys and values.
    adds = grids.size_of_piece[1] < grids.region.asked[0]
    make = torch.zeros_like if adds else torch.empty_like
    of_keys, of_values = (make(x, dtype=exact) for x in (grids.values, grids.values))
    for piece in grids.pieces():
        shares, pull = grids.shares(piece), grids.of_piece(gradient, piece)
        heads, queries = piece.heads, grids.of_piece(grids.queries, piece)
        _put(of_values[heads], shares.to(pull.dtype).mT, pull, adds=adds)
        errors = products(pull, grids.values[heads].mT).to(exact)
        errors.sub_(grids.of_piece(means, piece)).mul_(shares)
        rounded = errors.to(pull.dtype)
        _put(of_keys[heads], rounded.mT, queries, adds=adds)
        back = products(rounded, grids.keys[heads])
        of_along = of_table.new_zeros(*queries.shape[:2], len(of_table))
        of_rows, of_columns = grids.by_keys(of_along, piece.rows.start)
        if grids.is_grown:
            of_places = back.view(*of_rows.shape[:3], -1)[..., d:]
            of_rows.copy_(of_places[..., :h])
            of_columns.copy_(of_places[..., h:])
        else:
            by_places = errors.view(*of_rows.shape[:3], h, w)
            of_rows.copy_(by_places.sum(dim=4))
            of_columns.copy_(by_places.sum(dim=3))
        of_along = of_along.to(pull.dtype).flatten(0, 1)
        by_table = (of_along @ grids.table).view(queries.shape)
        torch.add(back[..., :d], by_table, out=grids.of_piece(of_queries, piece))
        of_table += of_along.mT @ queries.reshape(-1, d)
    return of_queries, of_keys.mul_(grids.scale), of_values
