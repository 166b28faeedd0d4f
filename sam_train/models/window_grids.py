"""Windows of one kind, head by head, and the scores of their queries, a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.models import compiled
from sam_train.models.products import products
from sam_train.models.windows import Region

CACHE_FLOATS = 1 << 21
"""Scores that are worked on at a time, by each thread where loops are compiled."""
MAX_GROWN = 0.6
"""Queries and keys grow by rows and columns up to so many of these for a channel: 14 + 14 for 64."""
KERNEL_QUERIES = 1024
"""Queries of a head that torch's kernel gets at a time, with a quarter of them for each of four threads."""
MAX_BIASES = 1 << 26
"""Biases that are made at a time, unless those of one head are more."""


class Piece(NamedTuple):
    """Heads (of windows) and rows of queries whose scores are worked on at a time."""

    heads: slice
    rows: slice


class Grids:
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
        query_bias: Tensor | None = None,
    ) -> None:
        self.region, self.window = region, window
        self.scale, self.table = qkv.shape[-1] ** -0.5, table
        h, w = window
        self.is_compiled = compiled.takes(qkv, table) or compiled.takes_bf16(qkv, table)
        is_small = h + w <= MAX_GROWN * qkv.shape[-1]
        self.is_grown = is_small and not self.is_compiled and table.dtype != torch.bfloat16
        queries, keys, values = (region.of(x) for x in qkv.unbind(3))
        self.shape = queries.shape[:4]
        num_heads = math.prod(self.shape)
        num_asked = region.asked[0] * region.asked[1]
        if query_bias is not None:
            biased = queries.new_empty(queries.shape)
            queries = torch.add(queries, query_bias[:, None, None], out=biased)
        self.queries = queries.reshape(num_heads, num_asked, qkv.shape[-1])
        padding_of = (None, None) if padding is None else (padding[1], padding[2])
        self.keys = self._padded(keys, padding_of[0], h + w if self.is_grown else 0, self.scale)
        self.values = self._padded(values, padding_of[1], 0)
        if self.is_grown:
            places = self.keys.unflatten(1, window)[..., qkv.shape[-1] :]
            places[..., :h] = torch.eye(h, dtype=table.dtype)[:, None]
            places[..., h:] = torch.eye(w, dtype=table.dtype)
        # Loops round once, what they have summed; torch's kernels would after every sum.
        exact = table.dtype if self.is_compiled else torch.promote_types(table.dtype, torch.float32)
        self._dtype_of_scores = exact
        self.size_of_piece = self._size_of_piece()
        most = self.size_of_piece[0] * self.size_of_piece[1] * region.asked[1]
        # Every piece's in turn: fresh memory would be paid for in page faults.
        self._scores = table.new_empty(most * h * w, dtype=exact)
        self._shares = torch.empty_like(self._scores[:0] if self.is_compiled else self._scores)
        self._along: Tensor | None = None
        self._grown = table.new_empty(most * self.keys.shape[-1]) if self.is_grown else None

    def _padded(
        self, tokens: Tensor, padding: Tensor | None, num_more: int, scale: float = 1.0
    ) -> Tensor:
        (h, w), (asked_h, asked_w), d = self.window, self.region.asked, tokens.shape[-1]
        out = tokens.new_empty(*self.shape, h, w, d + num_more)
        torch.mul(tokens, scale, out=out[..., :asked_h, :asked_w, :d])
        if padding is not None:
            for part in self.padding_of(out):
                part[..., :d] = scale * padding[:, None, None]
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
        num_scores = CACHE_FLOATS * (2 if self._dtype_of_scores == torch.bfloat16 else 1)
        num_heads = num_scores // (h * w * num_keys)
        if num_heads:
            return min(num_heads, max(1, len(self.keys))), h
        # A head for each thread: MKL divides a batch better than a product.
        most = torch.get_num_threads() if self.is_compiled else 1
        num_heads = max(1, min(most, len(self.keys)))
        return num_heads, min(h, max(1, num_scores // (w * num_keys)))

    def pieces(self) -> Iterator[Piece]:
        heads, rows = self.size_of_piece
        for head, row in product(
            range(0, len(self.keys), heads), range(0, self.region.asked[0], rows)
        ):
            yield Piece(slice(head, head + heads), slice(row, row + rows))

    def of_piece(self, x: Tensor, piece: Piece) -> Tensor:
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
        # Of bfloat16, torch's kernel would round the biases, which are added to the scores.
        if not (self.is_compiled or self.is_grown or self.queries.dtype == torch.bfloat16):
            return self._answers_of_kernel()
        out = torch.empty_like(self.queries)
        for piece in self.pieces():
            shares, factors = self.shares(piece)
            values, answers = self.values[piece.heads], self.of_piece(out, piece)
            if factors is not None:
                torch.mul(products(shares, values), factors, out=answers)
            else:
                products(shares.to(out.dtype), values, out=answers)
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
            piece = Piece(slice(head, head + heads), slice(row, row + rows))
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

    def shares(self, piece: Piece) -> tuple[Tensor, Tensor | None]:
        """Each query's weights of the values, and what they are yet to be multiplied by.

        Returns:
            (heads, queries, h * w), and (heads, queries, 1) or None. Without compiled loops, float32 for
            bfloat16.
        """
        queries, keys = self.of_piece(self.queries, piece), self.keys[piece.heads]
        num_heads, num_queries, d = queries.shape
        scores = self._scores[: num_heads * num_queries * keys.shape[1]]
        scores = scores.view(num_heads, num_queries, -1)
        if self.is_compiled:
            products(queries, keys.mT, out=scores)
            if self._along is None or piece.rows.start == 0:
                self._along = self.along(self.queries[piece.heads])
            along = self.of_piece(self._along, piece._replace(heads=slice(None))).contiguous()
            width, first_row = self.region.asked[1], piece.rows.start
            return scores, compiled.soften(scores, along, self.window, width, first_row)
        rows, columns = self.by_keys(self.along(queries), piece.rows.start)
        h, w = self.window
        if self._grown is not None:
            grown = self._grown[: num_heads * num_queries * keys.shape[2]]
            grown = grown.view(*rows.shape[:3], -1)
            grown[..., :d] = queries.view(*rows.shape[:3], d)
            grown[..., d : d + h] = rows
            grown[..., d + h :] = columns
            products(grown.flatten(1, 2), keys.mT, out=scores)
        else:
            put(scores, queries, keys.mT)
            by_places = scores.view(*rows.shape[:3], h, w)
            by_places += rows[..., None]
            by_places += columns[..., None, :]
        shares = self._shares[: scores.numel()].view(scores.shape)
        return torch.softmax(scores, dim=-1, out=shares), None

    def of_scores(
        self,
        errors: Tensor,
        shares: Tensor,
        factors: Tensor | None,
        means: Tensor | None,
        piece: Piece,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the weights to those of the scores, and of `along`: None where the keys grew.

        `means` (heads, queries, 1), of the errors by the weights, are for torch's kernels: loops make them.
        """
        if factors is not None:
            width, first_row = self.region.asked[1], piece.rows.start
            of_along = compiled.soften_back(errors, shares, factors, self.window, width, first_row)
            return errors, of_along
        assert means is not None
        errors.sub_(means).mul_(shares)
        if self.is_grown:
            return errors, None
        of_along = errors.new_zeros(*errors.shape[:2], len(self.table))
        of_rows, of_columns = self.by_keys(of_along, piece.rows.start)
        by_places = errors.view(*of_rows.shape[:3], *self.window)
        of_rows.copy_(by_places.sum(dim=4))
        of_columns.copy_(by_places.sum(dim=3))
        return errors, of_along


def put(out: Tensor, a: Tensor, b: Tensor, *, adds: bool = False) -> None:
    """The batch of products into `out`, or onto it, whose precision may be the greater one."""
    if out.dtype == a.dtype and not adds:
        products(a, b, out=out)
    elif adds:
        out += products(a, b)
    else:
        out.copy_(products(a, b))
