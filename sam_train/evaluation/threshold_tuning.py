"""Proposes the thresholds of automatic mask generation for a model, from images whose masks are known."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sam_train.data.source import DamagedSampleError, Source, readable
from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator, nms
from sam_train.inference.candidates import Candidates
from sam_train.models.sam import Sam
from sam_train.ops import run_edges
from sam_train.ops.files import write_atomically
from sam_train.structures import Annotation

log = logging.getLogger(__name__)

NUM_IOU_STEPS = 24
STABILITY_STEPS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98)
MATCH_IOU = 0.5
"""A mask finds an object if their IoU is above: then no other object has as much of it."""


class Matched(NamedTuple):
    """All candidates of an image, before any threshold.

    Attributes:
        candidates: without their pixels.
        objects: (K,) int64 the object each overlaps most.
        ious: (K,) float64 by how much.
        num_objects: in the image.
    """

    candidates: Candidates
    objects: np.ndarray
    ious: np.ndarray
    num_objects: int


class Tried(NamedTuple):
    """A pair of thresholds and what comes of it.

    Attributes:
        pred_iou_thresh, stability_score_thresh: the pair.
        quality: the panoptic quality in [0, 1]: IoUs of the objects found, over objects found, plus half
            of those missed, plus half of the masks that are of none.
        recall: share of the objects that are found.
        precision: share of the masks that find an object.
        masks_per_image: how many there are.
    """

    pred_iou_thresh: float
    stability_score_thresh: float
    quality: float
    recall: float
    precision: float
    masks_per_image: float


class Tuned(NamedTuple):
    """What `ThresholdTuning.run` found.

    Attributes:
        best: the pair of highest quality.
        current: the generator's own pair.
        num_images: looked at.
        out: the file with all pairs.
    """

    best: Tried
    current: Tried
    num_images: int
    out: Path

    def __str__(self) -> str:
        lines = [f"{'':>9}  pred_iou  stability  quality  recall  precision  masks an image"]
        for name, tried in (("now", self.current), ("proposed", self.best)):
            iou, stability, *rest, masks = tried
            numbers = "".join(f"{number:>9.3f}" for number in rest)
            lines.append(f"{name:>9}  {iou:>8.3f}  {stability:>9.3f}{numbers}  {masks:>8.1f}")
        return "\n".join(
            [
                *lines,
                f"From {self.num_images} images: masks of objects that are not labelled count as wrong.",
                f"Use preset.pred_iou_thresh={self.best.pred_iou_thresh:.3f} "
                f"preset.stability_score_thresh={self.best.stability_score_thresh:.3f}",
                f"See {self.out}",
            ]
        )


@dataclass(frozen=True, kw_only=True)
class ThresholdTuning:
    """Tries pairs of the predicted IoU and stability thresholds; the other settings stay as they are.

    Every image goes through the model once.

    Attributes:
        generator: builds the mask generator for a model: a node of `conf/preset/`.
        max_images: looked at, in an order that only the source and its seed decide.
    """

    generator: Callable[..., SamAutomaticMaskGenerator]
    max_images: int = 20

    def run(self, model: Sam, source: Source, out: Path) -> Tuned:
        """Tries them.

        Args:
            model: in eval mode.
            source: images with all, or nearly all, of their objects labelled.
            out: gets all pairs, as JSON.

        Raises:
            ValueError: there is no image with masks, or the model finds none of their objects.
        """
        generator = self.generator(model=model)
        images = []
        with tqdm(total=self.max_images, unit=" images", desc="tune", dynamic_ncols=True) as bar:
            records = source.records(epoch=0, reader=0, num_readers=1, shuffle=True)
            for record in readable(records):
                try:
                    image = record.image
                except DamagedSampleError:  # counted and logged already
                    continue
                if objects := [own for own in record.annotations if own.area > 0]:
                    images.append(matched(generator, image, objects))
                    bar.update()
                if len(images) == self.max_images:
                    break
        if not images:
            raise ValueError("expected images with masks to tune on, found none: check data=")
        tried = try_thresholds(generator, images)
        best = max(tried, key=lambda own: own.quality)
        if not best.quality:
            raise ValueError(
                "the model finds none of the labelled objects, whatever the thresholds: look at its "
                "clicks with sam-eval, or ask more points with preset.points_per_side"
            )
        (current,) = try_pairs(
            generator, images, generator.stability_score_thresh, [generator.pred_iou_thresh]
        )
        content = {
            "best": best._asdict(),
            "current": current._asdict(),
            "tried": [own._asdict() for own in tried],
        }
        write_atomically(out, json.dumps(content, indent=1) + "\n")
        return Tuned(best, current, len(images), out)


def matched(
    generator: SamAutomaticMaskGenerator, image: np.ndarray, objects: list[Annotation]
) -> Matched:
    """All candidates of an image, whatever the generator's thresholds, and the objects they are of."""
    asking = copy(generator)
    asking.pred_iou_thresh = asking.stability_score_thresh = 0.0
    asking.box_nms_thresh = asking.crop_nms_thresh = 1.0  # no IoU is above
    found, _ = asking.find(image)
    ious = overlaps(found, [run_edges.from_rle(own.rle) for own in objects])
    empty = [np.zeros(0, np.int64)] * len(found.edges)
    best = ious.argmax(axis=1)
    return Matched(
        found._replace(edges=empty), best, ious[np.arange(len(best)), best], len(objects)
    )


def overlaps(found: Candidates, objects: list[np.ndarray]) -> np.ndarray:
    """(K, M) the IoU of each candidate with each object, both as edges."""
    areas, object_areas = (
        [run_edges.area(own) for own in edges] for edges in (found.edges, objects)
    )
    ious = np.zeros((len(areas), len(objects)))
    for i, area in enumerate(areas):
        for j, other in enumerate(object_areas):
            if MATCH_IOU * max(area, other) < min(area, other):
                common = run_edges.intersection_area(found.edges[i], objects[j])
                ious[i, j] = common / (area + other - common)
    return ious


def try_thresholds(generator: SamAutomaticMaskGenerator, images: list[Matched]) -> list[Tried]:
    """All pairs of a grid: predicted IoUs at the quantiles of what the model says."""
    said = torch.cat([own.candidates.iou_predictions for own in images]).double()
    steps = torch.linspace(0, 1, NUM_IOU_STEPS + 1, dtype=torch.float64)[:-1]
    # Rounded down as they are printed; towards the top, where most is decided, more of them.
    quantiles = said.quantile(1 - (1 - steps) ** 2).clamp_min(0)
    iou_steps = sorted({float(np.floor(1e3 * value) / 1e3) for value in quantiles.tolist()})
    return [
        own
        for stability in STABILITY_STEPS
        for own in try_pairs(generator, images, stability, iou_steps)
    ]


def try_pairs(
    generator: SamAutomaticMaskGenerator,
    images: list[Matched],
    stability: float,
    iou_steps: list[float],
) -> list[Tried]:
    """One stability threshold with several predicted IoUs."""
    sums = np.zeros((len(iou_steps), 3))  # IoUs, objects found, masks
    for own in images:
        stable = own.candidates.stability_scores >= stability
        index = torch.arange(len(stable)) if stability <= 0 else stable.nonzero()[:, 0]
        index = index[_nms_in_crops(own.candidates.take(index), generator.box_nms_thresh)]
        ious = own.candidates.iou_predictions[index]
        for step, least in enumerate(iou_steps):
            # What NMS drops, it drops for a surer one: it may come before this threshold.
            kept = index[ious > least] if least > 0 else index
            kept = kept[_nms_across_crops(own.candidates.take(kept), generator.crop_nms_thresh)]
            sums[step] += _score(own, kept.numpy())
    num_objects = sum(own.num_objects for own in images)
    return [
        Tried(
            least,
            stability,
            quality=total / ((num_objects + masks) / 2),
            recall=hits / num_objects,
            precision=hits / max(masks, 1),
            masks_per_image=masks / len(images),
        )
        for least, (total, hits, masks) in zip(iou_steps, sums.tolist(), strict=True)
    ]


def _score(own: Matched, kept: np.ndarray) -> tuple[float, int, int]:
    """The IoUs of the objects found, how many they are, and how many masks there are."""
    best = np.zeros(own.num_objects)
    np.maximum.at(best, own.objects[kept], own.ious[kept])
    hits = best > MATCH_IOU
    return float(best[hits].sum()), int(hits.sum()), len(kept)


def _nms_in_crops(found: Candidates, threshold: float) -> Tensor:
    crops, which = found.crop_boxes.unique(dim=0, return_inverse=True)
    kept = [torch.zeros(0, dtype=torch.int64)]
    for crop in range(len(crops)):
        own = (which == crop).nonzero()[:, 0]
        kept.append(own[nms(found.boxes[own], found.iou_predictions[own], threshold)])
    return torch.cat(kept)


def _nms_across_crops(found: Candidates, threshold: float) -> Tensor:
    x0, y0, x1, y1 = found.crop_boxes.unbind(1)
    areas = (x1 - x0) * (y1 - y0)
    if not len(areas) or bool((areas == areas[0]).all()):
        return torch.arange(len(areas))
    return nms(found.boxes, 1 / areas, threshold)
