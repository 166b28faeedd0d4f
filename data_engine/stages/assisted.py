"""The first stage: people label images from nothing, with the model's help (SAM, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from data_engine.images import image_pixels
from data_engine.mask_store.store import Store
from data_engine.prominence import image_prominence
from data_engine.records import Image, Task
from sam_train.inference.predictor import SamPredictor
from sam_train.inference.prompt_groups import decode_in_passes
from sam_train.structures import FOREGROUND, ImageFeatures

Queue = Literal["prominence", "uncertainty"]
Look = Callable[[Image, np.ndarray], None]
"""Sets a predictor to an image, given its pixels."""
GRID_SIDE = 8
"""Points a side of the grid that tells how sure a model is of an image."""


@dataclass(frozen=True, kw_only=True)
class AssistedStage:
    """How images are handed out.

    Attributes:
        queue: which go first; see `priority`.
        move_on_after_s: on one mask, for the page and for whoever simulates a person; None: never.
    """

    queue: Queue = "prominence"
    move_on_after_s: float | None = 30.0

    def __post_init__(self) -> None:
        check_queue(self.queue)
        if self.move_on_after_s is not None and not self.move_on_after_s > 0:
            raise ValueError(f"move_on_after_s is above 0, or null, got {self.move_on_after_s}")

    def tasks(
        self,
        round_number: int,
        images: Sequence[Image],
        predictor: SamPredictor | None,
        look: Look | None = None,
    ) -> Iterator[Task]:
        """See `assisted_tasks`; `look` sets the predictor, by default through its encoder."""
        for image in images:
            pixels, is_set = image_pixels(image), False
            if look is not None and self.queue == "uncertainty":
                look(image, pixels)
                is_set = True
            yield Task(
                id=task_id("assisted", round_number, image),
                round=round_number,
                stage="assisted",
                image_id=image.id,
                priority=priority(pixels, self.queue, predictor, is_set=is_set),
                payload={"move_on_after_s": self.move_on_after_s},
            )


def assisted_tasks(
    store: Store,
    round_number: int,
    images: Sequence[Image],
    queue: str = "prominence",
    *,
    predictor: SamPredictor | None = None,
    move_on_after_s: float | None = 30.0,
) -> list[Task]:
    """A task for each image that is still registered; made again, they are the same.

    Args:
        store: with the images.
        round_number: of the engine.
        images: of the round.
        queue: `prominence` or `uncertainty`.
        predictor: of the current model; `uncertainty` asks it, `prominence` does without.
        move_on_after_s: on one mask; None: never.

    Raises:
        ImageGoneError: an image is not where it was.
        ValueError: an image is held out, or there is no such queue.
    """
    check_queue(queue)
    stage = AssistedStage(queue=queue, move_on_after_s=move_on_after_s)  # type: ignore[arg-type]
    return list(stage.tasks(round_number, registered(store, images), predictor))


def registered(store: Store, images: Sequence[Image]) -> list[Image]:
    """Those of these images that were not taken down meanwhile.

    Raises:
        ValueError: one is held out: labels of people would make it useless for measuring.
    """
    for image in images:
        if image.held_out:
            raise ValueError(f"{image.key} is held out for measuring and is not labelled")
    known = store.images_by_id([image.id for image in images])
    return [image for image in images if image.id in known]


def task_id(stage: str, round_number: int, image: Image) -> str:
    """The name of an image's task in a round."""
    return f"{stage}-{round_number:03d}-{image.id}"


def priority(
    pixels: np.ndarray, queue: str, predictor: SamPredictor | None, *, is_set: bool = False
) -> float:
    """How early an image is handed out: higher goes first.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        queue: `prominence`: by the most prominent thing in it, told without a model. `uncertainty`: one
            less the mean predicted IoU of the best mask for each point of a grid.
        predictor: left with this image set by `uncertainty`, else not asked.
        is_set: the predictor is set to this image already.

    Raises:
        ValueError: `uncertainty` has no predictor.
    """
    if queue == "prominence":
        return image_prominence(pixels)
    if predictor is None:
        raise ValueError(
            "queue=uncertainty asks the current model: give assisted_tasks a predictor"
        )
    if not is_set:
        predictor.set_image(pixels)
    return 1.0 - float(_predicted_ious(predictor).amax(1).mean())


@torch.no_grad()
def _predicted_ious(predictor: SamPredictor) -> Tensor:
    """Of the three candidates for each point of a grid: (P, 3)."""
    assert predictor.features is not None and predictor.original_size is not None
    height, width = predictor.original_size
    steps = (np.arange(GRID_SIDE) + 0.5) / GRID_SIDE
    points = np.stack(np.meshgrid(steps * width, steps * height), axis=-1).reshape(-1, 1, 2)
    coords = predictor.transform.apply_coords(points, predictor.original_size)
    labels = torch.full(coords.shape[:2], FOREGROUND, device=predictor.device)
    on_device = torch.as_tensor(coords, dtype=torch.float, device=predictor.device)
    prompts = predictor.model.prompt_encoder.to_prompts((on_device, labels), None, None)
    features = ImageFeatures(predictor.features)
    answer = decode_in_passes(predictor.model, features, prompts, multimask_output=True)
    return answer.iou_predictions


def check_queue(queue: str) -> None:
    """Raises a ValueError for what is no queue."""
    if queue not in get_args(Queue):
        raise ValueError(f"queue is one of {', '.join(get_args(Queue))}, got {queue!r}")
