"""The second stage: confident masks are shown ready-made, and people do the rest (SAM, section 4).

A one-class detector, trained on the masks of the first stage, or a COCO results file, gives boxes; the model
makes a mask of each; those that it is sure of go into the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torchvision.ops import nms

from data_engine.images import image_pixels
from data_engine.mask_store.store import Store
from data_engine.records import Image, Task
from data_engine.stages.assisted import Look, Queue, check_queue, priority, registered, task_id
from sam_train.data.coco_boxes import read_coco_boxes
from sam_train.inference.predictor import SamPredictor
from sam_train.inference.prompted import ObjectPrompt, answer_set
from sam_train.models.box_detector import BoxDetector, EncoderBoxDetector
from sam_train.ops.boxes import xywh_to_xyxy
from sam_train.structures import Annotation, DetectedBoxes, ImageFeatures


class BoxSource(Protocol):
    """Whatever says where objects are."""

    def __call__(self, image: Image, pixels: np.ndarray, predictor: SamPredictor) -> DetectedBoxes:
        """The boxes of an image, best first; the predictor is set to it."""
        ...


@dataclass(frozen=True)
class DetectorBoxes:
    """Of a detector, see `load_detector`.

    Attributes:
        detector: in eval mode; one with an encoder of the predictor's own (`load_detector(sam=...)`) reads
            the embeddings that are there.
    """

    detector: BoxDetector

    def __call__(self, image: Image, pixels: np.ndarray, predictor: SamPredictor) -> DetectedBoxes:
        """See `BoxSource`."""
        shares = (
            isinstance(self.detector, EncoderBoxDetector)
            and self.detector.image_encoder is predictor.model.image_encoder
        )
        if shares and predictor.features is not None:
            features = ImageFeatures(predictor.features)
            return self.detector.detect_features(features, [image.size])[0]  # type: ignore[operator]
        return self.detector.detect([pixels])[0]


class CocoBoxes:
    """Of a COCO results file.

    Args:
        path: of the results.
        annotations: the COCO file that lists the images by the `image_id` of the results. Without it an
            `image_id` is an image's key, or the number that its key is ("000000000139" is 139).

    Raises:
        FileNotFoundError, UnusableSourceError: as `read_coco_boxes`; or `annotations` lists no images.
    """

    def __init__(self, path: str | Path, annotations: str | Path | None = None) -> None:
        self._path = path
        found = read_coco_boxes(path)
        names = {} if annotations is None else _stems(annotations)
        self._by_key = {names.get(number, str(number)): own for number, own in found.items()}

    def check(self, images: Sequence[Image]) -> None:
        """Raises a ValueError where not one of these images has a box: then its numbers mean others."""
        if images and not any(self._of(image) for image in images):
            raise ValueError(
                f"{self._path} has no box of any of {len(images)} images: its image_id are "
                f"{', '.join(list(self._by_key)[:3])} ..., the images are called {images[0].key} ...; "
                "give the COCO file that its image_id belong to (annotations)"
            )

    def __call__(self, image: Image, pixels: np.ndarray, predictor: SamPredictor) -> DetectedBoxes:
        """See `BoxSource`."""
        return self._of(image) or DetectedBoxes(torch.zeros(0, 4), torch.zeros(0))

    def _of(self, image: Image) -> DetectedBoxes | None:
        stem = PurePosixPath(image.member or image.path).stem
        numbers = [str(int(stem))] if stem.isdecimal() else []
        keys = [key for key in (stem, image.key, *numbers) if key in self._by_key]
        return self._by_key[keys[0]] if keys else None


class _Listed(msgspec.Struct):
    id: int | str
    file_name: str


class _Images(msgspec.Struct):
    images: list[_Listed]


def _stems(annotations: str | Path) -> dict[int | str, str]:
    """The names of the images of a COCO file without folder and suffix, by id."""
    try:
        listed = msgspec.json.decode(Path(annotations).read_bytes(), type=_Images).images
    except msgspec.DecodeError as error:
        raise ValueError(f"{annotations} is no COCO file: {error}") from None
    return {one.id: PurePosixPath(one.file_name).stem for one in listed}


@dataclass(frozen=True, kw_only=True)
class SemiAutomaticStage:
    """Which masks are shown, and how images are handed out.

    Attributes:
        min_box_score: of a box, as its source has it.
        min_predicted_iou, min_stability: of its mask.
        nms_iou: of two masks whose boxes overlap by more the one of lower predicted IoU is left out.
        max_area_fraction: of the image, above which a mask is left out.
        max_masks: shown on an image, the best ones.
        queue, move_on_after_s: as in `AssistedStage`.
    """

    min_box_score: float = 0.5
    min_predicted_iou: float = 0.7
    min_stability: float = 0.85
    nms_iou: float = 0.7
    max_area_fraction: float = 0.9
    max_masks: int = 200
    queue: Queue = "prominence"
    move_on_after_s: float | None = 30.0

    def __post_init__(self) -> None:
        check_queue(self.queue)
        for name in ("min_box_score", "min_predicted_iou", "min_stability", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is in [0, 1], got {getattr(self, name)}")
        if self.max_masks < 1:
            raise ValueError(f"max_masks is 1 or more, got {self.max_masks}")
        if self.move_on_after_s is not None and not self.move_on_after_s > 0:
            raise ValueError(f"move_on_after_s is above 0, or null, got {self.move_on_after_s}")

    def tasks(
        self,
        round_number: int,
        images: Sequence[Image],
        predictor: SamPredictor,
        boxes: BoxSource,
        model_id: str | None = None,
        look: Look | None = None,
    ) -> Iterator[Task]:
        """See `semi_automatic_tasks`; `look` sets the predictor, by default through its encoder."""
        for image in images:
            pixels = image_pixels(image)
            if look is None:
                predictor.set_image(pixels)
            else:
                look(image, pixels)
            rank = priority(pixels, self.queue, predictor, is_set=True)
            shown = self.confident_masks(predictor, boxes(image, pixels, predictor))
            yield Task(
                id=task_id("semi_automatic", round_number, image),
                round=round_number,
                stage="semi_automatic",
                image_id=image.id,
                priority=rank,
                payload={
                    "masks": [{**one, "model_id": model_id} for one in shown],
                    "move_on_after_s": self.move_on_after_s,
                },
            )

    def confident_masks(
        self, predictor: SamPredictor, found: DetectedBoxes
    ) -> list[dict[str, Any]]:
        """The masks to show of an image, best first.

        Args:
            predictor: with the image set.
            found: its boxes, original frame.

        Returns:
            {"id", "rle", "predicted_iou", "stability_score", "box_score"} each.
        """
        assert predictor.original_size is not None
        height, width = predictor.original_size
        is_sure = found.scores >= self.min_box_score
        limits = found.boxes.new_tensor([width, height, width, height])
        boxes = torch.minimum(found.boxes[is_sure].clamp_min(0), limits).cpu()
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores = boxes[has_area], found.scores[is_sure].cpu()[has_area]
        if not len(boxes):
            return []
        made = answer_set(predictor, [ObjectPrompt(box=box) for box in boxes.double().numpy()])
        kept = [
            (own, score)
            for own, score in zip(made, scores.tolist(), strict=True)
            if self._is_confident(own, height * width)
        ]
        ranked = [kept[place] for place in self._without_doubles([own for own, _ in kept])]
        return [
            {
                "id": f"{number:03d}",
                "rle": dict(own.rle),
                "predicted_iou": own.predicted_iou,
                "stability_score": own.stability_score,
                "box_score": score,
            }
            for number, (own, score) in enumerate(ranked[: self.max_masks])
        ]

    def _is_confident(self, own: Annotation, num_pixels: int) -> bool:
        assert own.predicted_iou is not None and own.stability_score is not None
        return (
            0 < own.area <= self.max_area_fraction * num_pixels
            and own.predicted_iou >= self.min_predicted_iou
            and own.stability_score >= self.min_stability
        )

    def _without_doubles(self, masks: Sequence[Annotation]) -> list[int]:
        """Places of those that are left, best predicted IoU first."""
        if not masks:
            return []
        boxes = xywh_to_xyxy(torch.tensor([own.bbox for own in masks], dtype=torch.float))
        ious = torch.tensor([own.predicted_iou for own in masks])
        places: list[int] = nms(boxes, ious, self.nms_iou).tolist()
        return places


def semi_automatic_tasks(
    store: Store,
    round_number: int,
    images: Sequence[Image],
    *,
    predictor: SamPredictor,
    boxes: BoxSource,
    stage: SemiAutomaticStage | None = None,
    model_id: str | None = None,
) -> list[Task]:
    """A task with its ready-made masks for each image that is still registered.

    Args:
        store: with the images.
        round_number: of the engine.
        images: of the round.
        predictor: of the current model; left set to the last image.
        boxes: `DetectorBoxes(load_detector(path, sam=model))` or `CocoBoxes(path)`.
        stage: `conf/stage/semi_automatic.yaml`; None: its defaults.
        model_id: of the model, which goes with the masks.

    Raises:
        ImageGoneError: an image is not where it was.
        ValueError: an image is held out, or a COCO results file is of other images.
    """
    chosen = registered(store, images)
    if isinstance(boxes, CocoBoxes):
        boxes.check(chosen)
    return list(
        (stage or SemiAutomaticStage()).tasks(round_number, chosen, predictor, boxes, model_id)
    )
