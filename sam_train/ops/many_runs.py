"""The run lengths of many masks of one image, read and measured together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sam_train.ops.rle import Rle, Runs, run_lengths, size_of, uncompress

MOST_POSITIONS = 2**16
"""Looked up at a time: their numbers stay in the processor's caches."""


class ManyRuns:
    """Masks of one size as one row of pixels: down the columns of the first, then of the second.

    Attributes:
        size: (H, W) of each mask.
        edges: (K + 1,) positions between the runs, from 0 to M * H * W.
        is_one: (K,) int64, 1 where a run is of ones.
        areas: (M,) the number of ones in each.
    """

    def __init__(self, rles: Sequence[Rle]) -> None:
        """Reads them.

        Args:
            rles: at least one, compressed or not.

        Raises:
            ValueError: says what is wrong with the first that is damaged or of another size.
        """
        sizes = {size_of(rle) for rle in rles}
        if len(sizes) != 1:
            raise ValueError(f"masks measured together have one size, got {sorted(sizes)}")
        (self.size,) = sizes
        num_pixels = self.size[0] * self.size[1]
        try:
            counts, num_runs = _read(rles)
        except ValueError:
            _blame(rles)
            raise
        self.edges = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=self.edges[1:])
        ends = np.cumsum(num_runs)
        if (
            not counts.size
            or counts.min() < 0
            or counts.max() > num_pixels
            or (self.edges[ends] != num_pixels * np.arange(1, len(rles) + 1)).any()
        ):
            _blame(rles)
        firsts = ends - num_runs
        self.is_one = (np.arange(len(counts)) - np.repeat(firsts, num_runs)) & 1
        self._ones_before = np.zeros(len(self.edges), np.int64)
        np.cumsum(counts * self.is_one, out=self._ones_before[1:])
        self.areas = self._ones_before[ends] - self._ones_before[firsts]

    def inside(self, which: Sequence[int], windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What windows leave of masks, without making pixels: the work goes with runs and columns.

        Args:
            which: N masks, by index, ascending.
            windows: (N, 4) xyxy, whole original pixels, the end exclusive.

        Returns:
            (N,) areas, and (N, 4) the tightest xyxy boxes, zeros where nothing is left; both int64.
        """
        height, width = self.size
        areas, boxes = np.zeros(len(which), np.int64), np.zeros((len(which), 4), np.int64)
        window_of = np.full(len(self.areas), -1)
        window_of[list(which)] = np.arange(len(which))
        starts, ends = self.edges[:-1], self.edges[1:]
        mask = starts // (height * width)
        wanted = np.flatnonzero(self.is_one.astype(bool) & (ends > starts))
        wanted = wanted[window_of[mask[wanted]] >= 0]
        # Each run in pieces that lie in one column.
        starts, ends, mask = starts[wanted], ends[wanted], mask[wanted]
        first, last = starts // height, (ends - 1) // height
        num_pieces = last - first + 1
        run = np.repeat(np.arange(len(wanted)), num_pieces)
        nth = np.arange(len(run)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        column = first[run] + nth
        of = window_of[mask[run]]
        x0, y0, x1, y1 = windows.astype(np.int64)[of].T
        top = np.maximum(starts[run] - column * height, y0)
        bottom = np.minimum(ends[run] - column * height, y1)
        column -= mask[run] * width
        top, bottom = np.maximum(top, 0), np.minimum(bottom, height)
        left = np.flatnonzero((column >= x0) & (column < x1) & (bottom > top))
        if not left.size:
            return areas, boxes
        of, column, top, bottom = of[left], column[left], top[left], bottom[left]
        groups = np.flatnonzero(np.diff(of, prepend=-1))
        areas[of[groups]] = np.add.reduceat(bottom - top, groups)
        boxes[of[groups]] = np.stack(
            [
                np.minimum.reduceat(column, groups),
                np.minimum.reduceat(top, groups),
                np.maximum.reduceat(column, groups) + 1,
                np.maximum.reduceat(bottom, groups),
            ],
            axis=1,
        )
        return areas, boxes

    def coverage(
        self, which: Sequence[int] | np.ndarray, x_edges: np.ndarray, y_edges: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The areas of masks in each cell of a grid, exactly, each mask with a grid of its own.

        The count of ones before a position is linear between run ends, so a cell's share of a column
        is a difference of two such counts: the work goes with the cells, not the pixels.

        Args:
            which: N masks, by index.
            x_edges: (N, w + 1) ascending, original pixels; a grid of fewer cells repeats its last line.
                What lies outside the mask counts as 0.
            y_edges: (N, h + 1) likewise.

        Returns:
            A part of the N at a time: which of them, (n,), and (n, h', w') float64 in pixels, without the
            cells behind the last of the part's largest grid. Masks whose grid has no column are left out.
        """
        height, width = self.size
        masks = np.asarray(which)
        if not masks.size:
            return
        x, y = x_edges.clip(0, width), y_edges.clip(0, height)
        firsts = x[:, 0].astype(np.int64)
        num_columns = np.ceil(x[:, -1]).astype(np.int64) - firsts
        shapes = np.column_stack([_num_cells(y), _num_cells(x)])
        for chunk, most_rows, most_columns in _chunks(num_columns, shapes.tolist()):
            yield (
                chunk,
                self._coverage(
                    masks[chunk],
                    firsts[chunk],
                    num_columns[chunk],
                    x[chunk, : most_columns + 1],
                    y[chunk, : most_rows + 1],
                ),
            )

    def _coverage(
        self,
        which: np.ndarray,
        firsts: np.ndarray,
        num_columns: np.ndarray,
        x_edges: np.ndarray,
        y_edges: np.ndarray,
    ) -> np.ndarray:
        """(N, h, w) of grids padded to the same number of lines by their last ones."""
        height, width = self.size
        columns = firsts[:, None] + np.arange(num_columns.max())
        starts = (which[:, None] * width + columns.clip(max=width - 1)) * height
        # Rows as whole pixels and a rest, as the positions of many large masks leave a float no digits.
        rows = y_edges.astype(np.int64)
        ones = self._ones_until(starts[:, :, None] + rows[:, None, :], (y_edges - rows)[:, None, :])
        per_column = np.diff(ones, axis=2)
        before_column = np.zeros((len(which), columns.shape[1] + 1, per_column.shape[2]))
        np.cumsum(per_column, axis=1, out=before_column[:, 1:])
        column = np.minimum(x_edges.astype(np.int64) - firsts[:, None], num_columns[:, None] - 1)
        fraction = (x_edges - firsts[:, None] - column)[:, :, None]
        nth = np.arange(len(which))[:, None]
        before_edge = before_column[nth, column] + fraction * per_column[nth, column]
        return np.diff(before_edge, axis=1).swapaxes(1, 2)

    def _ones_until(self, positions: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """The number of ones before positions, whole and in [0, M * H * W], plus a rest in [0, 1)."""
        run = np.searchsorted(self.edges, positions.ravel(), side="right").reshape(positions.shape)
        run = np.minimum(run - 1, len(self.is_one) - 1)
        within = positions - self.edges[run] + rest
        return self._ones_before[run] + self.is_one[run] * within


def _blame(rles: Sequence[Rle]) -> None:
    """Raises what is wrong with the first damaged one."""
    for rle in rles:
        Runs(rle)


def _read(rles: Sequence[Rle]) -> tuple[np.ndarray, np.ndarray]:
    """The runs of all masks, and how many each has."""
    counts = [rle["counts"] for rle in rles]
    if all(isinstance(of_one, str) for of_one in counts):
        codes = np.frombuffer("".join(counts).encode("ascii"), np.uint8)
        return uncompress(codes, np.array([len(of_one) for of_one in counts]))
    runs = [run_lengths(rle) for rle in rles]
    return np.concatenate(runs), np.array([len(of_one) for of_one in runs])


def _chunks(
    num_columns: np.ndarray, shapes: Sequence[Sequence[int]]
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Grids of like size, which padding does not make much larger, and their most rows and columns.

    Those without a pixel column are left out.
    """
    order = np.argsort(num_columns, kind="stable")
    order = order[num_columns[order] > 0]
    start, most_rows, most_columns = 0, 0, 0
    for end, i in enumerate(order.tolist()):
        rows, columns = shapes[i]
        if (
            end > start
            and (end - start + 1) * int(num_columns[i]) * (max(most_rows, rows) + 1)
            > MOST_POSITIONS
        ):
            yield order[start:end], most_rows, most_columns
            start, most_rows, most_columns = end, 0, 0
        most_rows, most_columns = max(most_rows, rows), max(most_columns, columns)
    if start < len(order):
        yield order[start:], most_rows, most_columns


def _num_cells(lines: np.ndarray) -> np.ndarray:
    """(N,) how many cells there are before the last line is reached."""
    return (lines < lines[:, -1:]).sum(axis=1)
