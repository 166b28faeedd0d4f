"""What the generator's own filters leave to be judged: masks no reader can take, and models gone wrong.

Predicted IoU, stability, non-maximum suppression and size are filtered where the masks are found, in
`sam_train/inference/`, each before the work it saves; `conf/preset/` holds their thresholds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sam_train.inference.candidates import FilterReport
from sam_train.structures import Annotation


class UselessModelError(ValueError):
    """A model that finds nothing in any image, or everything in all; the message says what to do."""


def usable(annotations: Sequence[Annotation]) -> tuple[list[Annotation], Counter[str]]:
    """Leaves out masks without a pixel and those whose scores are no numbers.

    Returns:
        What is left, and how many were left out by the reason's name.
    """
    kept, rejects = [], Counter[str](empty=0, not_finite=0)
    for annotation in annotations:
        if annotation.area == 0:
            rejects["empty"] += 1
        elif not _has_scores(annotation):
            rejects["not_finite"] += 1
        else:
            kept.append(annotation)
    return kept, rejects


def _has_scores(annotation: Annotation) -> bool:
    scores = (annotation.predicted_iou, annotation.stability_score)
    return all(score is None or math.isfinite(score) for score in scores)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a model's answers are worth nothing.

    Attributes:
        max_masks_per_image: an image with more counts as overfull, and so does
        full_area_fraction: one whose every mask covers this share of it.
        judged_after: images; where all so far are without a mask, or all overfull, the work ends.
    """

    max_masks_per_image: int = 2000
    full_area_fraction: float = 0.95
    judged_after: int = 20

    def __post_init__(self) -> None:
        if self.max_masks_per_image < 1 or self.judged_after < 1:
            raise ValueError(
                "expected max_masks_per_image and judged_after of 1 or more, got "
                f"{self.max_masks_per_image} and {self.judged_after}"
            )
        if not 0 < self.full_area_fraction <= 1:
            raise ValueError(f"full_area_fraction is in (0, 1], got {self.full_area_fraction}")

    def is_overfull(self, annotations: Sequence[Annotation], size: tuple[int, int]) -> bool:
        """Whether an image of (H, W) has masks of everything, or has masks of all of it only."""
        full = self.full_area_fraction * size[0] * size[1]
        covered = bool(annotations) and all(own.area >= full for own in annotations)
        return covered or len(annotations) > self.max_masks_per_image


@dataclass
class Verdict:
    """Counts images until one shows that the model is of use.

    Attributes:
        limits: see there.
        num_images, num_empty, num_overfull: so far.
        report: what the filters rejected in the last shard, for the message.
    """

    limits: Limits
    num_images: int = 0
    num_empty: int = 0
    num_overfull: int = 0
    report: FilterReport = FilterReport()

    def add(self, *, images: int, empty: int, overfull: int) -> None:
        """Counts images."""
        self.num_images += images
        self.num_empty += empty
        self.num_overfull += overfull

    def check(self, *, at_end: bool = False) -> None:
        """Judges what was counted, if it is enough or there will be no more.

        Raises:
            UselessModelError: no image has a mask, or all are overfull.
        """
        if not self.num_images or (self.num_images < self.limits.judged_after and not at_end):
            return
        so_far = f"{self.num_images} image{'s' * (self.num_images > 1)}"
        if self.num_empty == self.num_images:
            raise UselessModelError(
                f"the model finds no mask in any of {so_far} ({self.report}): lower the thresholds "
                "of the filter that rejects most (sam-segment tune=true proposes some), or take "
                "another checkpoint"
            )
        if self.num_overfull == self.num_images:
            raise UselessModelError(
                f"the model finds more than {self.limits.max_masks_per_image} masks, or nothing but "
                f"masks of the whole image, in each of {so_far} ({self.report}): raise the "
                "thresholds, take preset=sa1b, which drops masks of the whole image, or another "
                "checkpoint; limits.max_masks_per_image takes more"
            )
