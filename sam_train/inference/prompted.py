"""`sam-segment mode=points` and `mode=boxes`: the same prompts on every image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sam_train.inference.inputs import InputError, checked_box, checked_points
from sam_train.inference.predictor import SamPredictor
from sam_train.inference.prompt_groups import decode_mixed, full_size
from sam_train.models.sam import Sam
from sam_train.ops import rle
from sam_train.ops.masks import stability_score
from sam_train.prompts.masks import best_candidate, chosen_logits
from sam_train.structures import Annotation, ImageFeatures, MaskPrediction

STABILITY_OFFSET = 1.0
"""SA-1B's stability scores cut the logits at one above and one below the threshold."""

POINTS_FORM = "points=[[x,y,label],...], label 1 for the object and 0 for what is not"
BOXES_FORM = "boxes=[[x0,y0,x1,y1],...]"


class ObjectPrompt(NamedTuple):
    """What is said about one object, original frame.

    Attributes:
        coords: (N, 2) clicks, or None.
        labels: (N,) of them.
        box: (4,) xyxy, or None.
    """

    coords: np.ndarray | None = None
    labels: np.ndarray | None = None
    box: np.ndarray | None = None

    @property
    def is_single(self) -> bool:
        """Whether it may be ambiguous: one click or one box, which three candidates answer."""
        return (0 if self.coords is None else len(self.coords)) + (self.box is not None) == 1


class PointSegmenter:
    """Answers the same clicks on every image.

    Args:
        model: in eval mode.
        points: [x, y, label] of one object, original frame; or a list of such lists, an object each.

    Raises:
        ValueError: the points are none, or not of this form.
    """

    def __init__(self, model: Sam, points: Sequence[Any] | None) -> None:
        self._predictor = SamPredictor(model)
        self.objects = [_clicks(own) for own in _objects(points)]

    def segment(self, image: np.ndarray) -> list[Annotation]:
        """Segments an (H, W, 3) uint8 RGB image: an annotation an object, in their order.

        Raises:
            InputError: a click lies outside.
        """
        height, width = image.shape[:2]
        for own in self.objects:
            assert own.coords is not None
            if (own.coords < 0).any() or (own.coords > (width - 1, height - 1)).any():
                raise InputError(
                    f"a point of {own.coords.tolist()} lies outside of the image, which is "
                    f"{width} pixels wide and {height} high"
                )
        return answer(self._predictor, image, self.objects)


class BoxSegmenter:
    """Answers the same boxes on every image.

    Args:
        model: in eval mode.
        boxes: [x0, y0, x1, y1] of an object each, original frame.

    Raises:
        ValueError: the boxes are none, or not of this form.
    """

    def __init__(self, model: Sam, boxes: Sequence[Any] | None) -> None:
        self._predictor = SamPredictor(model)
        if not boxes:
            raise ValueError(f"mode=boxes wants {BOXES_FORM}")
        self.objects = [ObjectPrompt(box=_box(values)) for values in boxes]

    def segment(self, image: np.ndarray) -> list[Annotation]:
        """Segments an (H, W, 3) uint8 RGB image: an annotation a box, in their order.

        Raises:
            InputError: a box lies outside.
        """
        height, width = image.shape[:2]
        for own in self.objects:
            assert own.box is not None
            if own.box.min() < 0 or own.box[2] > width or own.box[3] > height:
                raise InputError(
                    f"the box {own.box.tolist()} lies outside of the image, which is {width} pixels wide "
                    f"and {height} high"
                )
        return answer(self._predictor, image, self.objects)


@torch.no_grad()
def answer(
    predictor: SamPredictor, image: np.ndarray, objects: Sequence[ObjectPrompt]
) -> list[Annotation]:
    """Encodes an image and answers `answer_set` about it."""
    predictor.set_image(image)
    return answer_set(predictor, objects)


@torch.no_grad()
def answer_set(predictor: SamPredictor, objects: Sequence[ObjectPrompt]) -> list[Annotation]:
    """The mask of highest predicted IoU for each object of the image that is set.

    One at a time is made at the image's resolution.
    """
    assert predictor.features is not None
    answers: dict[int, MaskPrediction] = {}
    for is_single in (True, False):
        chosen = [i for i, own in enumerate(objects) if own.is_single == is_single]
        found = decode_mixed(
            predictor.model,
            ImageFeatures(predictor.features),
            [predictor.to_prompts(*objects[i], None) for i in chosen],
            [0] * len(chosen),
            multimask_output=is_single,
        )
        answers |= dict(zip(chosen, found, strict=True))
    return [_annotation(predictor, i, own, answers[i]) for i, own in enumerate(objects)]


def _annotation(
    predictor: SamPredictor, number: int, own: ObjectPrompt, prediction: MaskPrediction
) -> Annotation:
    assert predictor.original_size is not None and predictor.input_size is not None
    best = best_candidate(prediction)
    logits = full_size(
        predictor.model,
        chosen_logits(prediction, best),
        predictor.input_size,
        predictor.original_size,
        return_logits=True,
    )[0, 0]
    threshold = predictor.model.mask_threshold
    run_lengths = rle.encode((logits > threshold).cpu().numpy())
    stability = stability_score(logits, mask_threshold=threshold, threshold_offset=STABILITY_OFFSET)
    height, width = predictor.original_size
    extra: dict[str, Any] = {}
    if own.labels is not None:
        extra["point_labels"] = own.labels.tolist()
    if own.box is not None:
        extra["input_box"] = own.box.tolist()
    return Annotation(
        id=number,
        rle=run_lengths,
        bbox=rle.bbox(run_lengths),
        area=rle.area(run_lengths),
        predicted_iou=float(prediction.iou_predictions[0, best[0]]),
        stability_score=float(stability),
        point_coords=None if own.coords is None else tuple(map(tuple, own.coords.tolist())),
        crop_box=(0, 0, width, height),
        extra=extra,
    )


def _objects(points: Sequence[Any] | None) -> list[Any]:
    if not points:
        raise ValueError(f"mode=points wants {POINTS_FORM}")
    # One list deeper, each is an object of its own.
    is_nested = all(isinstance(own, Sequence) and all(_is_list(p) for p in own) for own in points)
    return list(points) if is_nested else [points]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _clicks(points: Any) -> ObjectPrompt:
    try:
        values = np.asarray(points, float)
        if values.ndim != 2 or values.shape[1] != 3 or not np.isin(values[:, 2], (0, 1)).all():
            raise ValueError
        coords, labels = checked_points(values[:, :2], values[:, 2].astype(int))
    except (ValueError, TypeError, InputError):
        raise ValueError(f"expected {POINTS_FORM}, got {points}") from None
    return ObjectPrompt(coords, labels)


def _box(values: Any) -> np.ndarray:
    try:
        box = checked_box(values)
        if box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError
    except (ValueError, TypeError, InputError):
        raise ValueError(f"expected {BOXES_FORM} with x1 > x0 and y1 > y0, got {values}") from None
    return box
