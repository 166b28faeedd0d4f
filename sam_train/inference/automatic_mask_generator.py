"""All masks of an image, from a grid of points on it and on its crops, under segment_anything's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from sam_train.inference.candidates import Candidates, FilterReport
from sam_train.inference.crops import Crop, crops, point_grids
from sam_train.inference.inputs import read_pixels
from sam_train.inference.mask_filters import MaskFilters, Place
from sam_train.inference.mask_windows import MaskUpscaler
from sam_train.inference.predictor import SamPredictor
from sam_train.models.sam import Sam
from sam_train.ops import rle, run_edges, small_regions
from sam_train.structures import Annotation, ImageFeatures, MaskPrediction

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")


class SamAutomaticMaskGenerator:
    """Asks a model at every point of a grid and keeps what is sure, stable and no duplicate.

    Takes the arguments and gives the values of `segment_anything.SamAutomaticMaskGenerator`. SA-1B's
    masks were made with three things more, the last two arguments and crops: `conf/preset/sa1b.yaml`.

    Args:
        model: the model.
        points_per_side: of the grid on the whole image; None takes `point_grids`.
        points_per_batch: points decoded together: the more, the more memory.
        pred_iou_thresh: a mask's predicted IoU must be above.
        stability_score_thresh: the least IoU of the mask cut at a higher and at a lower logit.
        stability_score_offset: how much higher and lower.
        box_nms_thresh: of two masks of a crop whose boxes have a higher IoU the surer one stays.
        crop_n_layers: layer n cuts the image in 2^n x 2^n overlapping crops, encoded one by one.
        crop_nms_thresh: likewise between crops, where the smaller crop's mask stays.
        crop_overlap_ratio: of the crops, see `crops.crops`.
        crop_n_points_downscale_factor: layer n has 1 / factor^n of the points a side.
        point_grids: instead of `points_per_side`, a layer each: (N, 2) of (x, y) in [0, 1].
        min_mask_region_area: pixels; smaller islands are removed and smaller holes filled. 0: never.
        output_mode: masks as "binary_mask" (H, W) bool, "uncompressed_rle" or "coco_rle".
        max_mask_area_fraction: a mask that covers as much of the image is dropped. None: never.
        drop_small_masks: drop a mask without any part of `min_mask_region_area`, instead of leaving
            its largest one.

    Attributes:
        report: how many candidates each filter rejected in the last image.

    Raises:
        InputError: (in `generate`) the image cannot be taken.
    """

    def __init__(
        self,
        model: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        max_mask_area_fraction: float | None = None,
        drop_small_masks: bool = False,
    ) -> None:
        if output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode is one of {', '.join(OUTPUT_MODES)}, got {output_mode}")
        if points_per_batch < 1:
            raise ValueError(f"points_per_batch is 1 or more, got {points_per_batch}")
        self.point_grids = _grids(
            points_per_side, point_grids, crop_n_layers, crop_n_points_downscale_factor
        )
        self.predictor = SamPredictor(model)
        # Plain attributes, as code written for segment_anything changes them between images.
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.max_mask_area_fraction = max_mask_area_fraction
        self.points_per_batch = points_per_batch
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self.drop_small_masks = drop_small_masks
        self.report = FilterReport()

    def generate(self, image: Any) -> list[dict[str, Any]]:
        """Finds the masks of an image.

        Args:
            image: (H, W, 3) uint8 RGB, or what else `inputs.read_pixels` takes by its rules.

        Returns:
            A dict a mask: `segmentation` (see `output_mode`), `area` in pixels, `bbox` [x, y, w, h]
            from the first to the last pixel, `predicted_iou`, `point_coords` [[x, y]],
            `stability_score` and `crop_box` [x, y, w, h].
        """
        found, size = self.find(image)
        areas = [run_edges.area(edges) for edges in found.edges]
        return [
            {
                "segmentation": self._segmentation(edges, size),
                "area": area,
                "bbox": _xywh(box),
                "predicted_iou": iou,
                "point_coords": [point],
                "stability_score": stability,
                "crop_box": _xywh(crop_box),
            }
            for edges, area, box, iou, stability, point, crop_box in zip(
                found.edges, areas, *(column.tolist() for column in found[1:]), strict=True
            )
        ]

    def annotations(self, image: Any) -> list[Annotation]:
        """Finds the masks of an image, as records of SA-1B; boxes end behind the last pixel."""
        found, size = self.find(image)
        return to_annotations(found, size)

    def find(self, image: Any) -> tuple[Candidates, tuple[int, int]]:
        """Finds the masks of an image, as they are held within, and its (H, W)."""
        pixels = read_pixels(image, in_chans=self.predictor.model.image_encoder.in_chans)
        size = (pixels.shape[0], pixels.shape[1])
        found, report = self.find_in(pixels, Place((0, 0), size, size))
        found, mending = self.mend(found, size)
        self.report = report.plus(mending)._replace(kept=len(found.edges))
        return found, size

    def find_in(self, pixels: np.ndarray, place: Place) -> tuple[Candidates, FilterReport]:
        """The masks of a region, in the frame of the whole image, before they are mended.

        Args:
            pixels: (h, w, C) uint8.
            place: of the region in the whole image.
        """
        all_crops = crops(place.region, self.crop_n_layers, self.crop_overlap_ratio)
        parts, report = [], FilterReport()
        for crop in all_crops:
            found, rejected = self._of_crop(pixels, crop, place)
            parts.append(found)
            report = report.plus(rejected)
        found = Candidates.joined(parts)
        if len(all_crops) > 1:
            x0, y0, x1, y1 = found.crop_boxes.unbind(1)
            kept = nms(found.boxes, 1 / ((x1 - x0) * (y1 - y0)), self.crop_nms_thresh)
            duplicates = len(found.edges) - len(kept)
            report = report.plus(FilterReport(duplicates_across_crops=duplicates))
            found = found.take(kept)
        return found, report

    def mend(self, found: Candidates, size: tuple[int, int]) -> tuple[Candidates, FilterReport]:
        """Removes small islands and holes, and what then is a duplicate.

        Args:
            found: masks.
            size: (H, W) of the whole image.
        """
        min_area = self.min_mask_region_area
        if min_area <= 0 or not found.edges:
            return found, FilterReport()
        mended = [small_regions.mend(edges, size, min_area) for edges in found.edges]
        big = [i for i, own in enumerate(mended) if own.largest_part >= min_area]
        chosen = torch.tensor(
            big if self.drop_small_masks else range(len(mended)), dtype=torch.long
        )
        mended = [mended[i] for i in chosen.tolist()]
        boxes = [run_edges.box(own.edges, size[0]) for own in mended]
        last_pixels = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)
        last_pixels[:, 2:] = (last_pixels[:, 2:] - 1).clamp_min(0)
        too_small = len(found.edges) - len(mended)
        found = found.take(chosen)._replace(edges=[own.edges for own in mended], boxes=last_pixels)
        # What needed no mending stays before what did.
        is_unchanged = torch.tensor([float(not own.changed) for own in mended])
        kept = nms(last_pixels, is_unchanged, max(self.box_nms_thresh, self.crop_nms_thresh))
        duplicates = len(mended) - len(kept)
        report = FilterReport(too_small=too_small, duplicates_after_mending=duplicates)
        return found.take(kept), report

    @torch.no_grad()
    def _of_crop(
        self, pixels: np.ndarray, crop: Crop, place: Place
    ) -> tuple[Candidates, FilterReport]:
        x0, y0, x1, y1 = crop.box
        predictor, size = self.predictor, (y1 - y0, x1 - x0)
        predictor.set_image(pixels[y0:y1, x0:x1])
        assert predictor.input_size is not None
        filters = MaskFilters(
            pred_iou_thresh=self.pred_iou_thresh,
            stability_score_thresh=self.stability_score_thresh,
            stability_score_offset=self.stability_score_offset,
            max_area_fraction=self.max_mask_area_fraction,
        )
        upscaler = MaskUpscaler(predictor.model, predictor.input_size, size)
        points = torch.from_numpy(self.point_grids[crop.layer] * size[::-1])
        parts, report = [Candidates.none()], FilterReport()
        for batch in points.split(self.points_per_batch):
            prediction = self._decode(batch, size)
            threshold = predictor.model.mask_threshold
            found, rejected = filters.apply(prediction, upscaler, threshold, batch, crop, place)
            parts.append(found)
            report = report.plus(rejected)
        predictor.reset_image()
        found = Candidates.joined(parts)
        kept = nms(found.boxes, found.iou_predictions, self.box_nms_thresh)
        duplicates = len(found.edges) - len(kept)
        return found.take(kept), report.plus(FilterReport(duplicates_in_crop=duplicates))

    def _decode(self, points: Tensor, size: tuple[int, int]) -> MaskPrediction:
        """Answers clicks (P, 2) in the crop of (H, W) that is set, three candidates each."""
        predictor, model = self.predictor, self.predictor.model
        assert predictor.features is not None
        coords = predictor.transform.apply_coords_torch(points, size).to(model.device)[:, None]
        labels = torch.ones(coords.shape[:2], dtype=torch.int64, device=model.device)
        prompts = model.prompt_encoder.to_prompts((coords, labels))
        return model.decode(ImageFeatures(predictor.features), prompts, multimask_output=True)

    def _segmentation(self, edges: np.ndarray, size: tuple[int, int]) -> Any:
        if self.output_mode == "coco_rle":
            return run_edges.to_rle(edges, size)
        if self.output_mode == "uncompressed_rle":
            return {"size": list(size), "counts": run_edges.counts(edges, size).tolist()}
        return run_edges.window(edges, (0, 0, size[1], size[0]), size[0])


def to_annotations(found: Candidates, size: tuple[int, int]) -> list[Annotation]:
    """Masks of an image of (H, W) as records of SA-1B."""
    annotations = []
    for number, (edges, _, iou, stability, point, crop_box) in enumerate(
        zip(found.edges, *(column.tolist() for column in found[1:]), strict=True)
    ):
        run_lengths = run_edges.to_rle(edges, size)
        x0, y0, x1, y1 = map(float, crop_box)
        annotations.append(
            Annotation(
                id=number,
                rle=run_lengths,
                bbox=rle.bbox(run_lengths),
                area=run_edges.area(edges),
                predicted_iou=iou,
                stability_score=stability,
                point_coords=(tuple(point),),
                crop_box=(x0, y0, x1 - x0, y1 - y0),
            )
        )
    return annotations


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The (N,) index of boxes (K, 4) that have no better one, the best first."""
    return batched_nms(boxes.float(), scores, torch.zeros(len(boxes)), threshold)


def _grids(
    points_per_side: int | None,
    given: Sequence[np.ndarray] | None,
    num_layers: int,
    downscale: int,
) -> list[np.ndarray]:
    if (points_per_side is None) == (given is None):
        raise ValueError("Exactly one of points_per_side or point_grids must be provided.")
    if given is None:
        assert points_per_side is not None
        return point_grids(points_per_side, num_layers, downscale)
    if len(given) <= num_layers:
        raise ValueError(
            f"point_grids are one for each of the {num_layers + 1} layers of crops, got {len(given)}"
        )
    return [_checked_grid(grid, layer) for layer, grid in enumerate(given)]


def _checked_grid(given: Any, layer: int) -> np.ndarray:
    """(N, 2) float64 shares of a crop's sides."""
    expected = f"point_grids[{layer}] is an (N, 2) array of (x, y) from 0 to 1"
    try:
        grid = np.asarray(given, float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected}, got what is no array of numbers: {error}") from error
    if grid.ndim != 2 or grid.shape[1] != 2:
        raise ValueError(f"{expected}, got the shape {grid.shape}")
    is_inside = ((grid >= 0) & (grid <= 1)).all(axis=1)  # NaN is neither
    if not is_inside.all():
        x, y = grid[~is_inside][0].tolist()
        raise ValueError(
            f"{expected}, shares of the width and the height and not pixels: {(~is_inside).sum()} of its "
            f"{len(grid)} points are not, the first ({x:g}, {y:g})"
        )
    return grid


def _xywh(box: list[int]) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
