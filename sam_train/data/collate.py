"""Packs samples of any number of masks into batches without repeating any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sam_train.structures import ImageBatch, ImageSample


def pack(
    samples: Iterable[ImageSample], *, batch_size: int, max_masks: int | None = None
) -> Iterator[list[ImageSample]]:
    """Groups samples in order, a group ending at `batch_size` images or before `max_masks` is passed.

    One sample that holds more than `max_masks` by itself makes a group of its own.
    """
    group: list[ImageSample] = []
    num_masks = 0
    for sample in samples:
        if group and max_masks is not None and num_masks + len(sample.masks) > max_masks:
            yield group
            group, num_masks = [], 0
        group.append(sample)
        num_masks += len(sample.masks)
        if len(group) == batch_size:
            yield group
            group, num_masks = [], 0
    if group:
        yield group


def collate(samples: Sequence[ImageSample], img_size: int) -> ImageBatch:
    """One batch of all the masks of all samples; images are padded at the bottom and right with 0."""
    if not samples:
        raise ValueError("a batch holds at least one sample")
    images = torch.zeros(len(samples), 3, img_size, img_size, dtype=torch.uint8)
    for padded, sample in zip(images, samples, strict=True):
        height, width = sample.input_size
        padded[:, :height, :width] = sample.image
    counts = torch.tensor([len(sample.masks) for sample in samples])
    return ImageBatch(
        images=images,
        input_sizes=torch.tensor([sample.input_size for sample in samples]),
        masks=torch.cat([sample.masks for sample in samples]),
        boxes=torch.cat([sample.boxes for sample in samples]),
        image_index=torch.arange(len(samples)).repeat_interleave(counts),
        keys=tuple(sample.key for sample in samples),
        seeds=tuple(sample.seed for sample in samples),
    )


class Parcel(NamedTuple):
    """A batch as it is sent from a reader's process: every tensor of its own would cost a handshake.

    Attributes:
        pixels: uint8, the images and then the masks.
        input_sizes, boxes, image_index: as in `ImageBatch`, sent by value.
        images_shape, masks_shape: of these.
        keys, seeds: as in `ImageBatch`.
    """

    pixels: Tensor
    input_sizes: np.ndarray
    boxes: np.ndarray
    image_index: np.ndarray
    images_shape: tuple[int, ...]
    masks_shape: tuple[int, ...]
    keys: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, batch: ImageBatch) -> Parcel:
        """Packs a batch."""
        return cls(
            pixels=torch.cat([batch.images.flatten(), batch.masks.view(torch.uint8).flatten()]),
            input_sizes=batch.input_sizes.numpy(),
            boxes=batch.boxes.numpy(),
            image_index=batch.image_index.numpy(),
            images_shape=tuple(batch.images.shape),
            masks_shape=tuple(batch.masks.shape),
            keys=batch.keys,
            seeds=batch.seeds,
        )

    def unpacked(self) -> ImageBatch:
        """The batch; images and masks are views of what was sent."""
        images, masks = self.pixels.split(
            [math.prod(self.images_shape), math.prod(self.masks_shape)]
        )
        return ImageBatch(
            images=images.view(self.images_shape),
            input_sizes=torch.from_numpy(self.input_sizes),
            masks=masks.view(torch.bool).view(self.masks_shape),
            boxes=torch.from_numpy(self.boxes),
            image_index=torch.from_numpy(self.image_index),
            keys=self.keys,
            seeds=self.seeds,
        )
