"""The filters of automatic mask generation (SAM, appendix B), each before the work it saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sam_train.inference.candidates import Candidates, FilterReport
from sam_train.inference.crops import Crop
from sam_train.inference.prompt_groups import MAX_LOGITS
from sam_train.models.sam import Sam
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
        model: Sam,
        prediction: MaskPrediction,
        points: Tensor,
        crop: Crop,
        input_size: tuple[int, int],
        place: Place,
    ) -> tuple[Candidates, FilterReport]:
        """Keeps the good ones of a pass of the decoder.

        Only what the predicted IoU leaves is brought to the crop's resolution, a few masks at a time.

        Args:
            model: the model.
            prediction: of P points.
            points: (P, 2) float64, (x, y) in the crop.
            crop: in the frame of `place.region`.
            input_size: (H, W) of the crop in the model input.
            place: of the region in the whole image.
        """
        num_points, num_masks = prediction.iou_predictions.shape
        ious = prediction.iou_predictions.flatten()
        is_kept = ious > self.pred_iou_thresh
        if self.pred_iou_thresh <= 0:
            is_kept = torch.ones_like(is_kept)
        index = is_kept.nonzero()[:, 0]
        report = FilterReport(
            points=num_points,
            candidates=num_points * num_masks,
            low_predicted_iou=len(ious) - len(index),
        )
        x0, y0, x1, y1 = crop.box
        at_once = max(1, MAX_LOGITS // max(model.image_encoder.img_size**2, (y1 - y0) * (x1 - x0)))
        logits = prediction.low_res_masks.flatten(0, 1)
        parts = [Candidates.none()]
        for chunk in index.split(at_once):
            full = model.postprocess_masks(logits[chunk, None], input_size, (y1 - y0, x1 - x0))
            clicks = points[chunk.cpu() // num_masks]
            found, rejected = self._of_logits(
                full[:, 0], model.mask_threshold, ious[chunk], clicks, crop, place
            )
            parts.append(found)
            report = report.plus(rejected)
        return Candidates.joined(parts), report

    def _of_logits(
        self,
        logits: Tensor,
        threshold: float,
        ious: Tensor,
        points: Tensor,
        crop: Crop,
        place: Place,
    ) -> tuple[Candidates, FilterReport]:
        """The filters that look at pixels: (K, h, w) logits of the crop, and what is known of each."""
        stability = self._stability(logits, threshold)
        is_stable = torch.ones_like(stability, dtype=torch.bool)
        if self.stability_score_thresh > 0:
            is_stable = stability >= self.stability_score_thresh
        masks = logits[is_stable] > threshold
        boxes = _last_pixels(masks_to_boxes(masks))
        is_whole = ~_is_cut(boxes, crop.box, place.region)
        areas = mask_area(masks)
        fits = torch.ones_like(is_whole)
        if self.max_area_fraction is not None:
            fits = areas < self.max_area_fraction * place.size[0] * place.size[1]
        kept = is_whole & fits
        top, left = place.origin[0] + crop.box[1], place.origin[1] + crop.box[0]
        edges = run_edges(masks[kept], top=top, left=left, height=place.size[0])
        offset = torch.tensor([left, top])
        chosen = is_stable.nonzero()[:, 0][kept]
        region_offset = torch.tensor(place.origin[::-1]).repeat(2)
        found = Candidates(
            edges,
            boxes[kept].cpu() + offset.repeat(2),
            ious[chosen].float().cpu(),
            stability[chosen].cpu(),
            points[chosen.cpu()] + offset,
            (torch.tensor(crop.box) + region_offset).expand(len(edges), 4),
        )
        report = FilterReport(
            low_stability=int((~is_stable).sum()),
            at_crop_edge=int((~is_whole).sum()),
            too_large=int((is_whole & ~fits).sum()),
        )
        return found, report

    def _stability(self, logits: Tensor, threshold: float) -> Tensor:
        """(K,) the IoU of a strict and a lax cut; NaN where the lax one is empty, as published."""
        strict = mask_area(logits > threshold + self.stability_score_offset)
        lax = mask_area(logits > threshold - self.stability_score_offset)
        return strict / lax


def _last_pixels(boxes: Tensor) -> Tensor:
    """Boxes (K, 4) of edges to int64 boxes of first and last pixel; empty ones stay zeros."""
    boxes = boxes.long()
    boxes[:, 2:] = (boxes[:, 2:] - 1).clamp_min(0)
    return boxes


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
