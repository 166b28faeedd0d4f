"""`sam-segment mode=automatic`: all masks of each image."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator, to_annotations
from sam_train.inference.candidates import FilterReport
from sam_train.inference.tiles import Tiling, find_in_tiles
from sam_train.models.sam import Sam
from sam_train.structures import Annotation

log = logging.getLogger(__name__)

ADVICE = (
    "; preset.pred_iou_thresh and preset.stability_score_thresh are set for released models: tune=true "
    "proposes values for this one from labelled images"
)
"""Where the thresholds have rejected most: what a model that was trained for a short time needs."""


class AutomaticSegmenter:
    """Finds all masks of each image.

    Args:
        model: in eval mode.
        generator: builds the mask generator for it: a node of `conf/preset/`.
        tile_px: larger images are cut in tiles of this side; None: never.
        tile_overlap_px: of neighbouring tiles.

    Attributes:
        report: how many candidates each filter rejected, in all images so far.
    """

    def __init__(
        self,
        model: Sam,
        generator: Callable[..., SamAutomaticMaskGenerator],
        tile_px: int | None = None,
        tile_overlap_px: int = 1000,
    ) -> None:
        self.generator = generator(model=model)
        self.tiling = (
            None if tile_px is None else Tiling(tile_px=tile_px, overlap_px=tile_overlap_px)
        )
        self.report = FilterReport()

    def segment(self, image: np.ndarray) -> list[Annotation]:
        """Segments an (H, W, 3) uint8 RGB image; an empty answer is logged with its reason."""
        size = (image.shape[0], image.shape[1])
        if self.tiling is None or max(size) <= self.tiling.tile_px:
            found, _ = self.generator.find(image)
            report = self.generator.report
        else:
            found, report = find_in_tiles(self.generator, image, self.tiling)
        self.report = self.report.plus(report)
        if not found.edges:
            log.warning("no mask was found: %s%s", report, _advice(report))
        return to_annotations(found, size)


def _advice(report: FilterReport) -> str:
    below = report.low_predicted_iou + report.low_stability
    return ADVICE if 2 * below > report.candidates else ""
