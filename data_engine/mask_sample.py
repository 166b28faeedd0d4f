"""Images of a round with their masks, whoever made them: a sample to be measured and shown."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_engine import mask_shapes
from data_engine.automatic_shards import AutomaticImage, automatic_shards, sample_images
from data_engine.images import image_pixels
from data_engine.mask_store.store import Store
from data_engine.mask_store.work import labelled_images
from data_engine.records import Mask, Rle, Round
from sam_train.data.source import sample_seed
from sam_train.structures import Annotation


class SampledMask(NamedTuple):
    """A mask of a round.

    Attributes:
        rle: its run lengths.
        area: in pixels.
        predicted_iou: the model's; None where there is none.
        num_clicks, seconds: of the person who made it; 0 for an automatic one.
    """

    rle: Rle
    area: float
    predicted_iou: float | None
    num_clicks: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class SampledImage:
    """An image of a round.

    Attributes:
        image_id, key: of the image.
        size: (H, W).
        masks: on it.
        pixels: (H, W, 3) uint8 RGB, when called; OSError where they are gone.
    """

    image_id: str
    key: str
    size: tuple[int, int]
    masks: Sequence[SampledMask]
    pixels: Callable[[], np.ndarray]


class Shapes(NamedTuple):
    """What is measured on a sample of images.

    Attributes:
        masks_per_image: (N,).
        relative_sizes: (M,) square roots of the share of the image, as SAM's figure 6.
        concavities: (M,) 1 - area / area of the convex hull, likewise.
        coverages: (N,) share of the image that is in any mask.
    """

    masks_per_image: np.ndarray
    relative_sizes: np.ndarray
    concavities: np.ndarray
    coverages: np.ndarray


def sampled_images(
    store: Store, root: Path, round_: Round, num_images: int, *, seed: int
) -> list[SampledImage]:
    """Images of a round, drawn without replacement; the same ones each time, all where there are fewer.

    Automatic shards that are gone or damaged are passed over; `RoundNumbers.missing` names them.
    """
    if round_.stage == "automatic":
        shards = [own for own in automatic_shards(store, root, round_.number) if own.is_there]
        found = sample_images(store, shards, num_images, seed=seed, with_masks=False)
        return [of_automatic(own) for own in found]
    done = labelled_images(store, round_.number, round_.stage)
    image_ids = heapq.nsmallest(
        num_images, done, key=lambda name: (sample_seed(seed, 0, name), name)
    )
    return list(_of_people(store, {image_id: done[image_id] for image_id in image_ids}))


def of_automatic(found: AutomaticImage) -> SampledImage:
    """An image of an automatic shard as one of a round."""
    masks = [_automatic_mask(own) for own in found.annotations if own.area]
    return SampledImage(found.image.id, found.image.key, found.image.size, masks, found.pixels)


def _automatic_mask(own: Annotation) -> SampledMask:
    return SampledMask(own.rle, own.area, own.predicted_iou)


def _of_people(store: Store, tasks: Mapping[str, str]) -> Iterator[SampledImage]:
    """The images of these tasks (their ids by image), those that were taken down meanwhile left out."""
    images = store.images_by_id(list(tasks))
    for image in (images[image_id] for image_id in tasks if image_id in images):
        own = [_hand_made(mask) for mask in store.masks(task_id=tasks[image.id])]
        yield SampledImage(image.id, image.key, image.size, own, partial(image_pixels, image))


def _hand_made(mask: Mask) -> SampledMask:
    return SampledMask(mask.rle, mask.area, mask.predicted_iou, mask.num_clicks, mask.seconds)


def measure_shapes(images: Sequence[SampledImage]) -> Shapes:
    """Measures all masks of these images."""
    masks = [(own, image.size) for image in images for own in image.masks]
    return Shapes(
        masks_per_image=np.array([len(image.masks) for image in images], float),
        relative_sizes=np.array([mask_shapes.relative_size(own.area, size) for own, size in masks]),
        concavities=np.array([mask_shapes.concavity(own.rle) for own, _ in masks]),
        coverages=np.array(
            [mask_shapes.coverage([own.rle for own in image.masks], image.size) for image in images]
        ),
    )
