"""The filters of automatic mask generation (SAM, appendix B), each before the work it saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sam_train.inference.candidates import Candidates, FilterReport
from sam_train.inference.crops import Crop
from sam_train.inference.mask_windows import MaskUpscaler, Windows
from sam_train.inference.prompt_groups import MAX_LOGITS
from sam_train.ops.boxes import masks_to_boxes
from sam_train.ops.masks import mask_area
from sam_train.ops.run_edges import run_edges
from sam_train.structures import MaskPrediction

CROP_EDGE_PX = 20.0
"""A box that ends this near its crop's edge counts as cut by it."""


class Place(NamedTuple):
    """Where the pixels a generator was given lie.

    Attributes:
        origin: (top, left) in the whole image; (0, 0) but for a tile.
        region: (H, W) of these pixels.
        size: (H, W) of the whole image.
    """

    origin: tuple[int, int]
    region: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class MaskFilters:
    """What a single mask must meet, whatever else was found.

    Attributes:
        pred_iou_thresh: the predicted IoU must be above; 0 lets all pass.
        stability_score_thresh: at least this IoU between the two cuts; 0 lets all pass.
        stability_score_offset: of the cuts from the mask's threshold, in logits.
        max_area_fraction: of the image; a mask that covers as much is dropped. None lets all pass.
    """

    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    max_area_fraction: float | None

    @torch.no_grad()
    def apply(
        self,
        prediction: MaskPrediction,
        upscaler: MaskUpscaler,
        threshold: float,
        points: Tensor,
        crop: Crop,
        place: Place,
    ) -> tuple[Candidates, FilterReport]:
        """Keeps the good ones of a pass of the decoder.

        Only what the predicted IoU leaves is brought to the crop's resolution, a few masks at a time.

        Args:
            prediction: of P points.
            upscaler: to the crop.
            threshold: where masks are cut.
            points: (P, 2) float64, (x, y) in the crop.
            crop: in the frame of `place.region`.
            place: of the region in the whole image.
        """
        num_points, num_masks = prediction.iou_predictions.shape
        ious = prediction.iou_predictions.flatten()
        is_sure = ious > self.pred_iou_thresh
        index = (is_sure if self.pred_iou_thresh > 0 else is_sure | ~is_sure).nonzero()[:, 0]
        report = FilterReport(
            points=num_points,
            candidates=num_points * num_masks,
            low_predicted_iou=len(ious) - len(index),
        )
        sure = prediction.low_res_masks.flatten(0, 1)[index]
        lowest = threshold - max(self.stability_score_offset, 0)
        parts, places = [Candidates.none()], [torch.zeros(0, dtype=torch.int64)]
        for own in upscaler.windows(sure, lowest, MAX_LOGITS):
            chosen = index[own.which]
            found, kept, rejected = self._of_windows(own, threshold, crop, place)
            chosen = chosen[kept]
            found = found._replace(
                iou_predictions=ious[chosen].float().cpu(),
                point_coords=points[chosen.cpu() // num_masks] + _offset(crop, place),
            )
            parts.append(found)
            places.append(chosen.cpu())
            report = report.plus(rejected)
        return Candidates.joined(parts).take(torch.cat(places).argsort()), report

    def _of_windows(
        self, own: Windows, threshold: float, crop: Crop, place: Place
    ) -> tuple[Candidates, Tensor, FilterReport]:
        """The filters that look at pixels.

        Returns:
            What they keep, yet without predicted IoUs and points, which of the windows these are, and
            how many are rejected.
        """
        stability = self._stability(own.logits, threshold)
        is_stable = torch.ones_like(stability, dtype=torch.bool)
        if self.stability_score_thresh > 0:
            is_stable = stability >= self.stability_score_thresh
        index = is_stable.nonzero()[:, 0]
        masks, tops, lefts = own.logits[index] > threshold, own.tops[index], own.lefts[index]
        boxes = _last_pixels(masks_to_boxes(masks), tops, lefts)
        is_whole = ~_is_cut(boxes, crop.box, place.region)
        fits = torch.ones_like(is_whole)
        if self.max_area_fraction is not None:
            most = self.max_area_fraction * place.size[0] * place.size[1]
            fits = mask_area(masks) < most
        kept = is_whole & fits
        offset = _offset(crop, place)
        left, top = offset.tolist()
        edges = run_edges(
            masks[kept], top=tops[kept] + top, left=lefts[kept] + left, height=place.size[0]
        )
        region_offset = torch.tensor(place.origin[::-1]).repeat(2)
        found = Candidates(
            edges,
            boxes[kept].cpu() + offset.repeat(2),
            torch.zeros(0),
            stability[index[kept]].cpu(),
            torch.zeros(0),
            (torch.tensor(crop.box) + region_offset).expand(len(edges), 4),
        )
        report = FilterReport(
            low_stability=len(is_stable) - len(index),
            at_crop_edge=int((~is_whole).sum()),
            too_large=int((is_whole & ~fits).sum()),
        )
        return found, index[kept], report

    def _stability(self, logits: Tensor, threshold: float) -> Tensor:
        """(K,) the IoU of a strict and a lax cut; NaN where the lax one is empty, as published."""
        strict = mask_area(logits > threshold + self.stability_score_offset)
        lax = mask_area(logits > threshold - self.stability_score_offset)
        return strict / lax


def _offset(crop: Crop, place: Place) -> Tensor:
    """The (x, y) of a crop's corner in the whole image."""
    return torch.tensor([place.origin[1] + crop.box[0], place.origin[0] + crop.box[1]])


def _last_pixels(boxes: Tensor, tops: Tensor, lefts: Tensor) -> Tensor:
    """Boxes (K, 4) of edges in windows to int64 ones of first and last pixel; empty ones are zeros."""
    boxes = boxes.long()
    is_filled = (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)
    boxes[:, 2:] -= 1
    return (boxes + torch.stack([lefts, tops, lefts, tops], dim=1)) * is_filled


def _is_cut(boxes: Tensor, crop_box: tuple[int, int, int, int], region: tuple[int, int]) -> Tensor:
    """Which boxes (K, 4), in the crop, end near an edge of it that is not the region's."""
    x0, y0, _, _ = crop_box
    whole = (0, 0, region[1], region[0])
    ends = (boxes + torch.tensor([x0, y0, x0, y0], device=boxes.device)).float()
    near_crop, near_region = (
        (ends - torch.tensor(edges, device=boxes.device)).abs() <= CROP_EDGE_PX
        for edges in (crop_box, whole)
    )
    return (near_crop & ~near_region).any(dim=1)
