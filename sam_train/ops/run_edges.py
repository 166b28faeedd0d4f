"""Masks as the borders of their runs: what is kept of a mask until it is known to be wanted.

A mask's edges are (2R,) int64: where each run of ones begins and where it ends, as flat positions
x * H + y down the columns of an image of height H, ascending. COCO run lengths are their differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.ops.rle import Rle, Runs, from_runs, runs_box

Edges = np.ndarray


def run_edges(masks: Tensor, *, top: int | Tensor, left: int | Tensor, height: int) -> list[Edges]:
    """The edges of masks that are windows of larger ones, all at once and where the masks are.

    Args:
        masks: (K, h, w) bool.
        top, left: of the window in the image, of all masks or (K,) int64.
        height: H of the image.
    """
    framed = F.pad(masks.transpose(1, 2), (1, 1))
    which, column, row = (framed[..., 1:] ^ framed[..., :-1]).nonzero(as_tuple=True)
    tops, lefts = (own[which] if isinstance(own, Tensor) else own for own in (top, left))
    positions = (lefts + column) * height + (tops + row)
    # A run down to the lower border goes on where the next column begins at the upper one.
    joined = (positions[1:] == positions[:-1]) & (which[1:] == which[:-1])
    kept = ~(F.pad(joined, (1, 0)) | F.pad(joined, (0, 1)))[: len(positions)]
    num_edges = torch.bincount(which[kept], minlength=len(masks)).cpu().numpy()
    flat = positions[kept].cpu().numpy()
    return [own.copy() for own in np.split(flat, np.cumsum(num_edges)[:-1])] if len(masks) else []


def area(edges: Edges) -> int:
    """The number of pixels."""
    return int((edges[1::2] - edges[::2]).sum())


def counts(edges: Edges, size: tuple[int, int]) -> np.ndarray:
    """The lengths of the runs of zeros and ones in turn, for an image of `size` (H, W)."""
    lengths = np.diff(edges, prepend=0, append=size[0] * size[1])
    return lengths if lengths[-1] or len(lengths) == 1 else lengths[:-1]


def to_rle(edges: Edges, size: tuple[int, int]) -> dict[str, Any]:
    """As a compressed COCO RLE whose counts are a str."""
    return from_runs(counts(edges, size), size)


def window(edges: Edges, box: tuple[int, int, int, int], height: int) -> np.ndarray:
    """The pixels of a window.

    Args:
        edges: of the mask.
        box: the window, xyxy in whole pixels, far edges exclusive.
        height: H of the image.

    Returns:
        (h, w) bool.
    """
    x0, y0, x1, y1 = box
    inner = (edges.clip(x0 * height, x1 * height) - x0 * height).astype(np.int64)
    lengths = np.diff(inner, prepend=0, append=(x1 - x0) * height)
    is_one = np.arange(len(lengths)) % 2 == 1
    return np.repeat(is_one, lengths).reshape(x1 - x0, height).T[y0:y1]


def box(edges: Edges, height: int) -> tuple[int, int, int, int]:
    """The tightest xyxy box, far edges exclusive; zeros where the mask is empty."""
    return runs_box(edges[::2], edges[1::2], height)


def rectangle(box: tuple[int, int, int, int], height: int) -> Edges:
    """The edges of a filled box, xyxy in whole pixels, in an image of this height."""
    x0, y0, x1, y1 = box
    starts = np.arange(x0, x1, dtype=np.int64) * height
    return _joined(np.stack([starts + y0, starts + y1], axis=1).ravel())


def intersection_area(a: Edges, b: Edges) -> int:
    """The pixels two masks of one image share; no pixel is made."""
    if not len(a) or not len(b):
        return 0
    before = np.concatenate([[0], np.cumsum(b[1::2] - b[::2])])
    run = np.searchsorted(b[::2], a, side="right")  # runs of b that begin until here
    last = np.maximum(run - 1, 0)
    ones = before[last] + np.minimum(a, b[1::2][last]) - b[::2][last]
    ones = np.where(run > 0, ones, 0)
    return int((ones[1::2] - ones[::2]).sum())


def union(masks: Sequence[Edges]) -> Edges:
    """The edges of all pixels that are in any of at least one mask of one image."""
    starts = np.sort(np.concatenate([own[::2] for own in masks]))
    ends = np.sort(np.concatenate([own[1::2] for own in masks]))
    # Before the n-th start in order, n - 1 runs have begun: it opens a new one if as many have ended.
    opens = np.searchsorted(ends, starts, side="left") == np.arange(len(starts))
    closes = np.searchsorted(starts, ends, side="right") == np.arange(1, len(ends) + 1)
    return _joined(np.stack([starts[opens], ends[closes]], axis=1).ravel())


def _joined(edges: Edges) -> Edges:
    """With runs that touch made one."""
    touching = np.flatnonzero(edges[1:-1:2] == edges[2::2])
    return np.delete(edges, np.concatenate([2 * touching + 1, 2 * touching + 2]))


def from_rle(rle: Rle) -> Edges:
    """The edges of a COCO RLE, compressed or not.

    Raises:
        ValueError: it is damaged.
    """
    edges = Runs(rle).edges
    own = edges[1 : 1 + 2 * ((len(edges) - 1) // 2)]
    starts, ends = own[::2], own[1::2]
    filled = ends > starts
    return _joined(np.stack([starts[filled], ends[filled]], axis=1).ravel())
