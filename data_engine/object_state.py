"""One object while it is worked on: what was said about it, what the model answered, what was painted.

Everything is in the original frame, but for logits, which are the model's low-resolution ones. Nothing here
changes once it is made, so that undoing is going back to the state before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
import torch

from sam_train.inference.predictor import SamPredictor
from sam_train.ops.masks import stability_score
from sam_train.prompts.masks import given_mask_logits

STABILITY_OFFSET = 1.0
"""SA-1B's stability scores cut the logits at one above and one below the threshold."""
Point = tuple[float, float]


class Candidate(NamedTuple):
    """A mask that the model offers.

    Attributes:
        mask: (H, W) bool.
        predicted_iou, stability_score: in [0, 1], or nearly.
        logits: (1, h, w) float32, to go on from.
    """

    mask: np.ndarray
    predicted_iou: float
    stability_score: float
    logits: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ObjectState:
    """Where the work on an object stands.

    Attributes:
        points: (x, y) of the clicks, pixel indices.
        labels: 1 or 0 of each.
        box: xyxy, or None.
        candidates: the model's last answer, best predicted IoU first.
        chosen: which of them counts; None where the mask does not come from them.
        mask: (H, W) bool; None before anything was answered or painted.
        logits: (1, h, w), fed to the model with the next click; None before the first answer.
    """

    points: tuple[Point, ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    candidates: tuple[Candidate, ...] = ()
    chosen: int | None = None
    mask: np.ndarray | None = None
    logits: np.ndarray | None = None

    @property
    def candidate(self) -> Candidate | None:
        """The one that counts."""
        return None if self.chosen is None else self.candidates[self.chosen]

    def with_click(self, x: float, y: float, label: int) -> ObjectState:
        """One more thing is said; the answer to what was said before does not count any more."""
        return replace(self, points=(*self.points, (x, y)), labels=(*self.labels, label))

    def with_choice(self, number: int) -> ObjectState:
        """Another candidate counts, as the model gave it."""
        candidate = self.candidates[number]
        return replace(self, chosen=number, mask=candidate.mask, logits=candidate.logits)


def answered(predictor: SamPredictor, state: ObjectState) -> ObjectState:
    """Asks the model: three candidates for the first click or box alone, one for all that goes on.

    Args:
        predictor: with the image set.
        state: with at least a click or a box; its logits are fed to the model with more than one.
    """
    is_first = len(state.points) + (state.box is not None) == 1 and state.logits is None
    logits, ious, low_res = predictor.predict(
        point_coords=np.array(state.points, float).reshape(-1, 2) if state.points else None,
        point_labels=np.array(state.labels, int) if state.points else None,
        box=None if state.box is None else np.array(state.box, float),
        mask_input=state.logits,
        multimask_output=is_first,
        return_logits=True,
    )
    threshold = predictor.model.mask_threshold
    stability = stability_score(
        torch.from_numpy(logits), mask_threshold=threshold, threshold_offset=STABILITY_OFFSET
    )
    candidates = [
        Candidate(logits[i] > threshold, float(ious[i]), float(stability[i]), low_res[i][None])
        for i in np.argsort(-ious, kind="stable")
    ]
    return replace(state, candidates=tuple(candidates)).with_choice(0)


def painted(
    predictor: SamPredictor, state: ObjectState, stroke: np.ndarray, value: bool
) -> ObjectState:
    """Adds a stroke's pixels to the mask, or takes them away; the next click starts from what is then there.

    Args:
        predictor: with the image set.
        state: may have no mask yet.
        stroke: (H, W) bool.
        value: whether they belong to the object.
    """
    mask = np.zeros_like(stroke) if state.mask is None else state.mask
    mask = mask | stroke if value else mask & ~stroke
    return replace(state, chosen=None, mask=mask, logits=mask_logits(predictor, mask))


def mask_logits(predictor: SamPredictor, mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) as what the model takes in: (1, h, w) logits on the grid of its own answers."""
    assert predictor.input_size is not None
    side = predictor.model.low_res_size
    scale = side / predictor.model.image_encoder.img_size
    height, width = (max(1, round(length * scale)) for length in predictor.input_size)
    shrunk = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    grid = np.zeros((side, side), bool)
    grid[:height, :width] = shrunk > 0.5
    return given_mask_logits(torch.from_numpy(grid)[None])[0].numpy()


def stroke_pixels(
    size: tuple[int, int], points: Sequence[Point], radius_px: float, *, fill: bool
) -> np.ndarray:
    """The pixels of a stroke.

    Args:
        size: (H, W).
        points: (x, y) pixel indices along it; one makes a dab.
        radius_px: of the round brush; 0 is one pixel.
        fill: closes the stroke and fills what it goes round.

    Returns:
        (H, W) bool.
    """
    drawn = np.zeros(size, np.uint8)
    line = np.rint(np.asarray(points, float)).astype(np.int32).reshape(-1, 1, 2)
    if fill:
        cv2.fillPoly(drawn, [line], 1)
    width = max(1, round(2 * radius_px))
    if len(line) == 1 and radius_px:
        cv2.circle(drawn, line[0, 0].tolist(), round(radius_px), 1, cv2.FILLED)
    else:
        cv2.polylines(drawn, [line], fill, 1, thickness=width)
    return drawn.astype(bool)
