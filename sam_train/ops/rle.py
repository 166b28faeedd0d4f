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
        starts, ends = self.edges[1:-1:2], self.edges[2::2]
        filled = ends > starts
        return runs_box(starts[filled], ends[filled], self.size[0])


def runs_box(starts: np.ndarray, ends: np.ndarray, height: int) -> tuple[int, int, int, int]:
    """The tightest xyxy box (far edges exclusive) of runs of ones; zeros where there is none.

    Args:
        starts, ends: (R,) flat positions x * height + y down the columns, ascending, no run empty.
        height: H of the image.
    """
    if not len(starts):
        return 0, 0, 0, 0
    (x0, top), (x1, low) = np.divmod(starts, height), np.divmod(ends - 1, height)
    if (x1 > x0).any():  # a run that goes on in the next column touches both borders
        return int(x0[0]), 0, int(x1[-1]) + 1, height
    return int(x0[0]), int(top.min()), int(x1[-1]) + 1, int(low.max()) + 1


def size_of(rle: Rle) -> tuple[int, int]:
    """The (H, W) an RLE states."""
    if (
        type(rle) is dict
        and "counts" in rle
        and type(size := rle.get("size")) is list
        and len(size) == 2
        and type(size[0]) is type(size[1]) is int
        and min(size) > 0
    ):
        return size[0], size[1]  # what nearly all are, told without the slower questions below
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
        return uncompress(np.frombuffer(counts, np.uint8), np.array([len(counts)]))[0]
    if isinstance(counts, Sequence) and all(type(run) is int for run in counts):
        try:
            return np.asarray(counts, np.int64)
        except OverflowError:
            raise ValueError("the RLE is damaged: it has a run of more than 63 bits") from None
    raise ValueError(
        f"an RLE's counts are a string or a list of integers, got {type(counts).__name__}"
    )


def uncompress(codes: np.ndarray, num_codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the compressed counts of several masks at once.

    They are groups of 6-bit digits, 5 of value and 1 for more to come, least significant first.

    Args:
        codes: (S,) uint8 characters, those of one mask after those of the other.
        num_codes: (M,) how many belong to each mask.

    Returns:
        (K,) int64 lengths of the runs of all masks, not checked, and (M,) how many belong to each.

    Raises:
        ValueError: they are damaged.
    """
    if not codes.size:
        return np.zeros(0, np.int64), np.zeros(len(num_codes), np.int64)
    digits = codes - np.uint8(48)  # what is below '0' comes round at the top
    if digits.max() > 63:
        raise ValueError("the RLE is damaged: its counts hold characters outside '0' to 'o'")
    is_last = digits < 32
    ends_of_masks = np.cumsum(num_codes)
    if not is_last[ends_of_masks[num_codes > 0] - 1].all():
        raise ValueError("the RLE is damaged: its counts end within a number")
    ends = np.flatnonzero(is_last)
    starts = np.empty_like(ends)
    starts[0], starts[1:] = 0, ends[:-1] + 1
    num_digits = ends - starts + 1
    most = int(num_digits.max())
    if most > 7:
        raise ValueError("the RLE is damaged: it has a run of more than 35 bits")
    low_bits = (digits & 31).astype(np.int64)
    values = low_bits[starts]
    for place in range(1, most):
        longer = np.flatnonzero(num_digits > place)
        values[longer] += low_bits[starts[longer] + place] << (5 * place)
    values -= (low_bits[ends] >> 4) << (5 * num_digits)
    runs_until = np.searchsorted(ends, ends_of_masks - 1, side="right")
    num_runs = runs_until.copy()
    num_runs[1:] -= runs_until[:-1]
    return _summed(values, runs_until - num_runs, num_runs), num_runs


def _summed(values: np.ndarray, firsts: np.ndarray, num_runs: np.ndarray) -> np.ndarray:
    """The run lengths: from the fourth of a mask on, a number is the difference from the run two before it."""
    place = np.arange(len(values))
    nth = place - np.repeat(firsts, num_runs)
    parity = nth & 1
    # Two chains side by side, even and odd; the first run belongs to neither.
    sums = np.zeros((len(values) + 1, 2), np.int64)
    sums[place + 1, parity] = np.where(nth > 0, values, 0)
    np.cumsum(sums, axis=0, out=sums)
    lengths = sums[place + 1, parity] - sums[np.repeat(firsts, num_runs), parity]
    return np.where(nth > 0, lengths, values)


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as a compressed RLE whose counts are a str, ready for JSON."""
    if mask.ndim != 2:
        raise ValueError(f"a mask is (H, W), got shape {mask.shape}")
    rle = coco_mask.encode(np.asfortranarray(mask.astype(bool), np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


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
