"""COCO run lengths: a mask as runs of 0 and 1 in turn, down the columns, beginning with 0.

`counts` is a list of lengths or, compressed, the string in which COCO and SA-1B keep it. pycocotools
writes the strings; they are read here, as it takes a damaged one without complaint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Rle = Mapping[str, Any]


class Runs:
    """The runs of one mask, checked, and what can be measured on them without making pixels.

    Attributes:
        size: (H, W) of the mask.
        edges: (K + 1,) flat positions (x * H + y) between the runs, from 0 to H * W; every odd run is
            of ones.
    """

    def __init__(self, rle: Rle) -> None:
        height, width = self.size = size_of(rle)
        counts = run_lengths(rle)
        self.edges = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=self.edges[1:])
        if counts.size and (counts.min() < 0 or counts.max() > height * width):
            raise ValueError(
                "the RLE is damaged: it has a run of negative length or one longer than the mask"
            )
        if self.edges[-1] != height * width:
            raise ValueError(
                f"the RLE is damaged or of another size: its runs cover {self.edges[-1]} pixels, "
                f"its size {height} x {width} has {height * width}"
            )

    @property
    def area(self) -> int:
        """The number of ones."""
        return int((self.edges[2::2] - self.edges[1:-1:2]).sum())

    def mask(self) -> np.ndarray:
        """The pixels, (H, W) bool."""
        height, width = self.size
        is_one = np.arange(len(self.edges) - 1) % 2 == 1
        return np.repeat(is_one, np.diff(self.edges)).reshape(width, height).T

    def box(self) -> tuple[int, int, int, int]:
        """The tightest xyxy box (far edges exclusive); zeros where the mask is empty."""
        height = self.size[0]
        starts, lasts = self.edges[1:-1:2], self.edges[2::2] - 1
        filled = lasts >= starts
        starts, lasts = starts[filled], lasts[filled]
        if not starts.size:
            return 0, 0, 0, 0
        x0, y_first = np.divmod(starts, height)
        x1, y_last = np.divmod(lasts, height)
        if (x1 > x0).any():  # a run that goes on in the next column touches both borders
            return int(x0[0]), 0, int(x1[-1]) + 1, height
        return int(x0[0]), int(y_first.min()), int(x1[-1]) + 1, int(y_last.max()) + 1

    def coverage(self, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
        """The area of the mask in each cell of a grid, exactly.

        The count of ones before a flat position is linear between run ends, so a cell's share of a
        column is a difference of two interpolations: the work goes with the cells, not the pixels.

        Args:
            x_edges: (w + 1,) ascending, original pixels; what lies outside the mask counts as 0.
            y_edges: (h + 1,) likewise.

        Returns:
            (h, w) float64, in pixels.
        """
        height, width = self.size
        x_edges, y_edges = np.clip(x_edges, 0, width), np.clip(y_edges, 0, height)
        first, last = int(x_edges[0]), int(np.ceil(x_edges[-1]))
        if last <= first:
            return np.zeros((len(y_edges) - 1, len(x_edges) - 1))
        positions = np.arange(first, last)[:, None] * height + y_edges
        per_column = np.diff(np.interp(positions, self.edges, self._ones_before()), axis=1)
        before_column = np.zeros((last - first + 1, per_column.shape[1]))
        np.cumsum(per_column, axis=0, out=before_column[1:])
        column = np.minimum(x_edges.astype(np.int64), last - 1) - first
        fraction = (x_edges - first - column)[:, None]
        before_edge = before_column[column] + fraction * per_column[column]
        return np.diff(before_edge, axis=0).T

    def _ones_before(self) -> np.ndarray:
        lengths = np.diff(self.edges)
        lengths[0::2] = 0
        ones = np.zeros(len(self.edges), np.int64)
        np.cumsum(lengths, out=ones[1:])
        return ones


def size_of(rle: Rle) -> tuple[int, int]:
    """The (H, W) an RLE states."""
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise ValueError(
            f"an RLE is {{'size': [h, w], 'counts': ...}}, got {type(rle).__name__}"
            + (f" with keys {sorted(rle)}" if isinstance(rle, Mapping) else "")
            + (": polygons need sam-convert" if isinstance(rle, list) else "")
        )
    size = rle["size"]
    if (
        isinstance(size, str)
        or not isinstance(size, Sequence)
        or len(size) != 2
        or any(not isinstance(side, int) or side < 1 for side in size)
    ):
        raise ValueError(f"an RLE's size is [height, width], two positive integers, got {size!r}")
    return int(size[0]), int(size[1])


def run_lengths(rle: Rle) -> np.ndarray:
    """The (K,) int64 lengths of an RLE's runs, compressed or not."""
    counts = rle["counts"]
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError:
            raise ValueError("the RLE is damaged: its counts are not ASCII") from None
    if isinstance(counts, bytes):
        return _uncompress(np.frombuffer(counts, np.uint8))
    if isinstance(counts, Sequence) and all(type(run) is int for run in counts):
        try:
            return np.asarray(counts, np.int64)
        except OverflowError:
            raise ValueError("the RLE is damaged: it has a run of more than 63 bits") from None
    raise ValueError(
        f"an RLE's counts are a string or a list of integers, got {type(counts).__name__}"
    )


def _uncompress(codes: np.ndarray) -> np.ndarray:
    """Reads groups of 6-bit digits, 5 of value and 1 for more to come, least significant first."""
    digits = codes.astype(np.int64) - 48
    if not digits.size:
        return digits
    if digits.min() < 0 or digits.max() > 63:
        raise ValueError("the RLE is damaged: its counts hold characters outside '0' to 'o'")
    is_last = digits < 32
    if not is_last[-1]:
        raise ValueError("the RLE is damaged: its counts end within a number")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    num_digits = ends - starts + 1
    if num_digits.max() > 7:
        raise ValueError("the RLE is damaged: it has a run of more than 35 bits")
    place = np.arange(len(digits)) - np.repeat(starts, num_digits)
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    negative = (digits[ends] & 16) != 0
    values = np.where(negative, values - (1 << (5 * num_digits)), values)
    # From the fourth run on, a number is the difference from the run two before it.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as a compressed RLE whose counts are a str, ready for JSON."""
    if mask.ndim != 2:
        raise ValueError(f"a mask is (H, W), got shape {mask.shape}")
    rle = coco_mask.encode(np.asfortranarray(mask.astype(bool), np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def encode_crop(mask: np.ndarray, top: int, left: int, size: tuple[int, int]) -> dict[str, Any]:
    """A mask (h, w) that lies at (top, left) of a larger one of `size` (H, W), as that one's RLE.

    The work goes with the pixels of the small one.
    """
    height, width = size
    framed = np.zeros((mask.shape[1], mask.shape[0] + 2), np.int8)
    framed[:, 1:-1] = mask.T
    column, row = np.nonzero(np.diff(framed, axis=1))
    edges = (left + column) * height + top + row
    # A run down to the lower border goes on where the next column begins at the upper one.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2])
    edges = np.delete(edges, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    counts = np.diff(edges, prepend=0, append=height * width)
    return from_runs(counts if counts[-1] else counts[:-1], size)


def from_runs(counts: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """The lengths of runs as a compressed RLE; they are checked."""
    plain = {"size": list(size), "counts": [int(count) for count in counts]}
    Runs(plain)
    rle = coco_mask.frPyObjects(plain, *size)
    return {"size": list(size), "counts": rle["counts"].decode("ascii")}


def compress(rle: Rle) -> dict[str, Any]:
    """Any RLE in the compressed form with str counts."""
    runs, counts = Runs(rle), rle["counts"]
    if not isinstance(counts, str | bytes):
        return from_runs(np.diff(runs.edges), runs.size)
    return {
        "size": list(runs.size),
        "counts": counts if isinstance(counts, str) else counts.decode("ascii"),
    }


def decode(rle: Rle) -> np.ndarray:
    """An RLE, compressed or not, as a mask (H, W) bool."""
    return Runs(rle).mask()


def decode_many(rles: Sequence[Rle]) -> np.ndarray:
    """RLEs of one size as masks (M, H, W) bool; (0, 0, 0) where there are none."""
    if not rles:
        return np.zeros((0, 0, 0), bool)
    sizes = {size_of(rle) for rle in rles}
    if len(sizes) > 1:
        raise ValueError(f"RLEs decoded together have one size, got {sorted(sizes)}")
    masks = np.empty((len(rles), *sizes.pop()), bool)
    for mask, rle in zip(masks, rles, strict=True):
        mask[:] = Runs(rle).mask()
    return masks


def area(rle: Rle) -> int:
    """The number of pixels in the mask."""
    return Runs(rle).area


def bbox(rle: Rle) -> tuple[float, float, float, float]:
    """The tightest (x, y, w, h), as SA-1B's `bbox`."""
    x0, y0, x1, y1 = Runs(rle).box()
    return float(x0), float(y0), float(x1 - x0), float(y1 - y0)
