"""Clicks: where an annotator would put the next point, and with which label.

Masks are (P, H, W) bool, P objects on a grid of any size; a point is the (x, y) index of a pixel of
that grid, as float. Everything here takes the prediction as None for "nothing predicted yet", which
makes the first click the same rule as a correction.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from sam_train.structures import BACKGROUND, FOREGROUND


class Clicks(NamedTuple):
    """One click on each of P objects.

    Attributes:
        coords: (P, 2) float, (x, y) indices of the clicked pixels.
        labels: (P,) int64, `FOREGROUND` or `BACKGROUND`.
    """

    coords: Tensor
    labels: Tensor


@torch.no_grad()
def uniform_click(
    gt_masks: Tensor,
    pred_masks: Tensor | None,
    uniform: Tensor,
    exclude: Tensor | None = None,
) -> Clicks:
    """Clicks a pixel drawn uniformly from where the prediction is wrong (SAM, appendix A).

    What was missed is clicked as foreground, what is too much as background: the label is the ground
    truth under the click. Where nothing is wrong, the click confirms: it is drawn from the whole
    object, or, for an empty object, from the whole grid (as background).

    A pixel of rank r is found by counting along rows, then within one row, so that besides the error
    (one byte a pixel) nothing of the masks' size is made.

    Args:
        gt_masks: (P, H, W) bool.
        pred_masks: (P, H, W) bool, or None for an empty prediction.
        uniform: (P,) float in [0, 1), one number per object.
        exclude: (P, N, 2) pixel indices not to click again (negative ones mean none), or None.
    """
    region = _error_region(gt_masks, pred_masks, exclude)
    width = gt_masks.shape[-1]
    error_rows = _count_rows(region)
    gt_rows = error_rows if region is gt_masks else _count_rows(gt_masks)
    is_wrong, has_object = error_rows.any(-1), gt_rows.any(-1)
    rows = torch.where(has_object[:, None], gt_rows, torch.full_like(gt_rows, width))
    rows = torch.where(is_wrong[:, None], error_rows, rows)

    ends = rows.cumsum(-1)
    total = ends[:, -1]
    rank = torch.minimum((uniform.double() * total).long(), total - 1)
    # Row y holds the ranks from ends[y - 1] up to, not including, ends[y].
    y = torch.searchsorted(ends, rank[:, None], right=True)
    rank_in_row = rank - (ends - rows).gather(1, y)[:, 0]

    objects = torch.arange(len(gt_masks), device=gt_masks.device)
    gt_row = gt_masks[objects, y[:, 0]]
    pixels = torch.where(is_wrong[:, None], region[objects, y[:, 0]], gt_row | ~has_object[:, None])
    x = torch.searchsorted(pixels.cumsum(-1), rank_in_row[:, None], right=True)

    coords = torch.cat([x, y], dim=1).float()
    return Clicks(coords, gt_row.gather(1, x)[:, 0].long())


def _count_rows(masks: Tensor) -> Tensor:
    """Pixels per row: (P, H, W) bool to (P, H) int32, which torch sums 25 times as fast as int64."""
    return masks.sum(-1, dtype=torch.int32)


def _error_region(gt_masks: Tensor, pred_masks: Tensor | None, exclude: Tensor | None) -> Tensor:
    region = gt_masks if pred_masks is None else gt_masks ^ pred_masks
    if exclude is None or exclude.shape[1] == 0:
        return region
    height, width = region.shape[-2:]
    x, y = exclude.round().long().unbind(-1)
    kept = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    flat = (y * width + x).where(kept, 0)
    region = region.flatten(1)
    # Points that are none write back what stands at pixel 0, unless that pixel itself is excluded.
    corner = region[:, :1] & ~((flat == 0) & kept).any(1, keepdim=True)
    values = corner.expand_as(flat) & ~kept
    return region.scatter(1, flat, values).view_as(gt_masks)


@torch.no_grad()
def center_click(
    gt_masks: Tensor,
    pred_masks: Tensor | None,
    exclude: Tensor | None = None,
) -> Clicks:
    """Clicks the centre of the larger error: RITM's rule, and SAM's for evaluation.

    Missed and surplus pixels each get their exact Euclidean distance to the nearest pixel that is not
    one of theirs; beyond the grid counts as such. Excluded pixels score zero (after the transform: they
    do not become holes). The pixel of the largest distance is clicked: foreground where the missed
    part's maximum is strictly the larger, else background; among equals the first in reading order.
    With nothing predicted this is the point of the object farthest from its boundary.

    Where nothing is left to mend, the click confirms: the centre of the object, or, for an empty one, of
    the grid (as background).

    The transform runs on the host, mask by mask, on the bounding box of each error: outside of it no
    zero can be nearer than those just around it, so the crop is exact, and it costs microseconds where
    the whole image costs milliseconds. No device has a batched exact transform that beats it.

    Args:
        gt_masks: (P, H, W) bool.
        pred_masks: (P, H, W) bool, or None for an empty prediction.
        exclude: (P, N, 2) pixel indices not to click again (negative ones mean none), or None.
    """
    gt = gt_masks.cpu().numpy()
    pred = None if pred_masks is None else pred_masks.cpu().numpy()
    num_objects = len(gt)
    excluded = (
        np.zeros((num_objects, 0, 2), np.int64)
        if exclude is None
        else exclude.round().long().cpu().numpy()
    )
    clicks = np.empty((num_objects, 3), np.int64)
    for i in range(num_objects):
        clicks[i] = _center_of(gt[i], None if pred is None else pred[i], excluded[i])
    placed = torch.from_numpy(clicks).to(gt_masks.device)
    return Clicks(placed[:, :2].float(), placed[:, 2])


def _center_of(
    gt: np.ndarray, pred: np.ndarray | None, excluded: np.ndarray
) -> tuple[int, int, int]:
    """Returns (x, y, label) of one object's click."""
    missed = gt if pred is None else gt & ~pred
    missed_depth, x, y = _deepest_pixel(missed, excluded)
    if pred is not None:
        surplus_depth, surplus_x, surplus_y = _deepest_pixel(pred & ~gt, excluded)
        if surplus_depth > 0 and surplus_depth >= missed_depth:
            return surplus_x, surplus_y, BACKGROUND
    if missed_depth > 0:
        return x, y, FOREGROUND
    return _confirming_click(gt, excluded)


def _confirming_click(gt: np.ndarray, excluded: np.ndarray) -> tuple[int, int, int]:
    """A click for a perfect mask: inside the object, on a fresh pixel while there is one."""
    region, label = (gt, FOREGROUND) if gt.any() else (np.ones_like(gt), BACKGROUND)
    depth, x, y = _deepest_pixel(region, excluded)
    if depth == 0:
        _, x, y = _deepest_pixel(region, excluded[:0])
    return x, y, label


def _deepest_pixel(region: np.ndarray, excluded: np.ndarray) -> tuple[int, int, int]:
    """Returns (squared distance, x, y) of the pixel deepest inside; distance 0 if there is none."""
    left, top, width, height = cv2.boundingRect(region.view(np.uint8))
    if width == 0:
        return 0, 0, 0
    crop = region[top : top + height, left : left + width].view(np.uint8)
    padded = cv2.copyMakeBorder(crop, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    # Where OpenCV calls on IPP, the last bit differs from call to call, and so would the click among
    # pixels equally deep. Squares of these distances are whole numbers.
    depth = np.rint(np.square(depth, dtype=np.float64)).astype(np.int64)
    for x, y in excluded:
        if left <= x < left + width and top <= y < top + height:
            depth[y - top, x - left] = 0
    row, column = divmod(int(depth.argmax()), width)
    return int(depth[row, column]), left + column, top + row
