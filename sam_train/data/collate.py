"""Packs samples of any number of masks into batches without repeating any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

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
