"""A grid of tokens cut into windows, of which those at the right and the bottom may be cut off."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from torch import Tensor


class Region(NamedTuple):
    """Windows of one kind: whole ones, those cut off at the right, at the bottom, and at both.

    Attributes:
        rows, columns: of the image's tokens.
        counts: windows above and beside each other.
        asked: (h', w') tokens of each that are no padding.
    """

    rows: slice
    columns: slice
    counts: tuple[int, int]
    asked: tuple[int, int]

    def of(self, x: Tensor) -> Tensor:
        """A view of (N, H, W, heads, c): (N, above, beside, heads, h', w', c)."""
        (above, beside), (h, w) = self.counts, self.asked
        tokens = x[:, self.rows, self.columns].unflatten(2, (beside, w)).unflatten(1, (above, h))
        return tokens.permute(0, 1, 3, 5, 2, 4, 6)


def regions(size: tuple[int, int], window: tuple[int, int]) -> Iterator[Region]:
    """What an (H, W) grid of tokens is cut into by windows (h, w), the first at its upper left corner."""
    runs = []
    for length, side in zip(size, window, strict=True):
        whole, rest = divmod(length, side)
        along = [(slice(0, whole * side), whole, side), (slice(whole * side, length), 1, rest)]
        runs.append([run for run in along if run[1] and run[2]])
    for (rows, above, h), (columns, beside, w) in product(*runs):
        yield Region(rows, columns, (above, beside), (h, w))
