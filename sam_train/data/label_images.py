"""Images whose pixel values name objects, as annotations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from scipy.ndimage import find_objects

from sam_train.ops.run_edges import run_edges, to_rle
from sam_train.structures import Annotation


def annotations_of(
    labels: np.ndarray,
    *,
    background: Collection[int] = (0,),
    components: bool = False,
    extra: Mapping[int, Mapping[str, Any]] | None = None,
) -> tuple[Annotation, ...]:
    """A mask for each value of an image (H, W) of integers, in ascending order, numbered from 0.

    Args:
        labels: what object each pixel belongs to.
        background: values that are no object.
        components: whether what does not touch, corners included, is an object of its own.
        extra: by value, what else the annotation is to say.
    """
    values, numbers = np.unique(labels, return_inverse=True)
    numbers = numbers.reshape(labels.shape) + 1
    found = []
    for number, place in enumerate(find_objects(numbers), start=1):
        value = int(values[number - 1])
        if value in background or place is None:
            continue
        crop = numbers[place] == number
        said = (extra or {}).get(value, {})
        for mask, top, left in _pieces(crop) if components else [(crop, 0, 0)]:
            found.append(
                _annotation(mask, top + place[0].start, left + place[1].start, labels.shape, said)
            )
    return tuple(replace(annotation, id=index) for index, annotation in enumerate(found))


def _pieces(mask: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
    """The connected parts of a mask, each cut out, with its top and left."""
    _, numbers = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    for number, place in enumerate(find_objects(numbers), start=1):
        yield numbers[place] == number, place[0].start, place[1].start


def _annotation(
    mask: np.ndarray, top: int, left: int, size: tuple[int, ...], extra: Mapping[str, Any]
) -> Annotation:
    # The work goes with the pixels of the small one.
    (edges,) = run_edges(torch.from_numpy(mask)[None], top=top, left=left, height=size[0])
    return Annotation(
        id=0,
        rle=to_rle(edges, (size[0], size[1])),
        bbox=(float(left), float(top), float(mask.shape[1]), float(mask.shape[0])),
        area=float(mask.sum()),
        extra=extra,
    )
