"""Measures whole-image mask generation: how many objects are among its best masks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from sam_train.data.source import DamagedSampleError, Source, readable
from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from sam_train.inference.candidates import FilterReport
from sam_train.inference.overlays import draw_annotations
from sam_train.metrics.average_recall import MAX_PROPOSALS, AverageRecall
from sam_train.models.sam import Sam
from sam_train.ops.drawing import save_image
from sam_train.ops.files import make_writable_folder, write_atomically
from sam_train.structures import Annotation

log = logging.getLogger(__name__)

PICTURE_PX = 1024


@dataclass(frozen=True, kw_only=True)
class ProposalBenchmark:
    """The protocol `proposals`: writes `metrics.json` and pictures.

    Attributes:
        generator: builds the mask generator for a model: a node of `conf/preset/`.
        max_images: stop after as many, in an order that only the source and its seed decide; None: all.
        num_pictures: of the first images: the objects, and beside them the nearest proposal of each.
    """

    generator: Callable[..., SamAutomaticMaskGenerator]
    max_images: int | None = None
    num_pictures: int = 4

    def run(
        self, model: Sam, source: Source, output_dir: Path, *, checkpoint: str = ""
    ) -> dict[str, Any]:
        """Measures `model` on `source`.

        Args:
            model: put in eval mode.
            source: the images and their masks.
            output_dir: gets `metrics.json` and `figures/`.
            checkpoint: where the model came from, for the record.

        Returns:
            What `metrics.json` holds.

        Raises:
            ValueError: there is no image with masks.
        """
        generator = self.generator(model=model.eval())
        output_dir = Path(output_dir)
        make_writable_folder(output_dir)
        metrics, report = AverageRecall(), FilterReport()
        dataset, num_images, num_proposals = "", 0, 0
        records = readable(
            source.records(epoch=0, reader=0, num_readers=1, shuffle=self.max_images is not None)
        )
        with tqdm(
            total=self.max_images, unit=" images", desc="proposals", dynamic_ncols=True
        ) as bar:
            for record in records:
                try:
                    image = record.image
                except DamagedSampleError:  # counted and logged already
                    continue
                found = [own for own in generator.annotations(image) if own.area > 0]
                objects = [own for own in record.annotations if own.area > 0]
                metrics.update(objects, found, [proposal_score(own) for own in found])
                report = report.plus(generator.report)
                if num_images < self.num_pictures:
                    path = output_dir / "figures" / f"{num_images}.jpg"
                    self._draw(path, image, objects, nearest(objects, found))
                dataset, num_images = record.source, num_images + 1
                num_proposals += len(found)
                bar.update()
                if num_images == self.max_images:
                    break
        if not metrics.num_objects:
            raise ValueError(
                "expected images with masks to evaluate on, found none: check the data's path, and "
                "with sam-convert check=PATH its content"
            )
        log.info("%s", report)
        result = {
            "protocol": "proposals",
            "dataset": dataset,
            "num_images": num_images,
            "num_masks": metrics.num_objects,
            "checkpoint": str(checkpoint),
            "metrics": metrics.compute() | {"proposals_per_image": num_proposals / num_images},
            "filters": report._asdict(),
        }
        write_atomically(output_dir / "metrics.json", json.dumps(result, indent=2) + "\n")
        return result

    def _draw(
        self,
        path: Path,
        image: np.ndarray,
        objects: Sequence[Annotation],
        found: Sequence[Annotation],
    ) -> None:
        pictures = [draw_annotations(image, own, longest_px=PICTURE_PX) for own in (objects, found)]
        save_image(path, np.concatenate(pictures, axis=1))


def nearest(objects: Sequence[Annotation], found: Sequence[Annotation]) -> list[Annotation]:
    """For each object the proposal of highest IoU, among those that the largest average recall looks at.

    Objects that none touches are left out.
    """
    ranked = sorted(found, key=proposal_score, reverse=True)[: MAX_PROPOSALS[-1]]
    if not ranked or not objects:
        return []
    ious = coco_mask.iou(
        [dict(own.rle) for own in ranked], [dict(own.rle) for own in objects], [0] * len(objects)
    )
    return [ranked[best] for best, iou in zip(ious.argmax(0), ious.max(0), strict=True) if iou > 0]


def proposal_score(annotation: Annotation) -> float:
    """The mean of predicted IoU and stability, what the SAM paper ranks proposals by (appendix D)."""
    assert annotation.predicted_iou is not None and annotation.stability_score is not None
    return (annotation.predicted_iou + annotation.stability_score) / 2
