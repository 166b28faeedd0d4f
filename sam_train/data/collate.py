"""Packs samples of any number of masks into batches without repeating any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

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
    return Parcel.of(samples, img_size).unpacked()


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
    def of(cls, samples: Sequence[ImageSample], img_size: int) -> Parcel:
        """Packs what `collate` makes of samples: each pixel is written once, where it is sent from."""
        if not samples:
            raise ValueError("a batch holds at least one sample")
        counts = [len(sample.masks) for sample in samples]
        images_shape = (len(samples), 3, img_size, img_size)
        masks_shape = (sum(counts), *samples[0].masks.shape[1:])
        pixels = _bytes(math.prod(images_shape) + math.prod(masks_shape))
        images, masks = _images_and_masks(pixels, images_shape, masks_shape)
        for padded, sample in zip(images, samples, strict=True):
            height, width = sample.input_size
            padded[:, :height, :width] = sample.image
            padded[:, height:] = 0
            padded[:, :height, width:] = 0
        torch.cat([sample.masks for sample in samples], out=masks)
        return cls(
            pixels=pixels,
            input_sizes=np.array([sample.input_size for sample in samples]),
            boxes=torch.cat([sample.boxes for sample in samples]).numpy(),
            image_index=np.repeat(np.arange(len(samples)), counts),
            images_shape=images_shape,
            masks_shape=masks_shape,
            keys=tuple(sample.key for sample in samples),
            seeds=tuple(sample.seed for sample in samples),
        )

    def unpacked(self) -> ImageBatch:
        """The batch; images and masks are views of what was sent."""
        images, masks = _images_and_masks(self.pixels, self.images_shape, self.masks_shape)
        return ImageBatch(
            images=images,
            input_sizes=torch.from_numpy(self.input_sizes),
            masks=masks,
            boxes=torch.from_numpy(self.boxes),
            image_index=torch.from_numpy(self.image_index),
            keys=self.keys,
            seeds=self.seeds,
        )


def _bytes(number: int) -> Tensor:
    """Uninitialised, and in a reader's process in the memory it shares with the one it serves."""
    if get_worker_info() is None:
        return torch.empty(number, dtype=torch.uint8)
    # As torch's own collate function does: what lies elsewhere is copied there when sent.
    storage = torch.UntypedStorage._new_shared(number, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _images_and_masks(
    pixels: Tensor, images_shape: tuple[int, ...], masks_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The two halves of `Parcel.pixels`, as views."""
    images, masks = pixels.split([math.prod(images_shape), math.prod(masks_shape)])
    return images.view(images_shape), masks.view(torch.bool).view(masks_shape)
