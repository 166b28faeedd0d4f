"""One sample held against its own JSON: everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from sam_train.data.annotations import decode_annotation
from sam_train.data.shards import decode_image, parse_sample
from sam_train.ops import rle
from sam_train.structures import Annotation

HIGHEST = {"predicted_iou": 1.25, "stability_score": 1.0}
"""What the optional scores do not exceed; a predicted IoU is a regression and may pass 1 by a little."""


def check_sample(files: Mapping[str, bytes]) -> tuple[list[Annotation], list[str]]:
    """A sample's annotations that can be read, and everything that is wrong with it.

    The image decodes and has the stated size. Each mask's run lengths have that size and sum, and a pixel
    at least; `area` is theirs, `bbox` within a pixel (SA-1B's own ends at the last pixel, ours after it).
    Scores are in range, points and crop boxes inside the image.
    """
    try:
        suffix, size, entries = parse_sample(files)
    except ValueError as error:
        return [], [str(error)]
    faults: list[str] = []
    try:
        decode_image(files[suffix], size)
    except ValueError as error:
        faults.append(str(error))
    annotations = []
    for index, entry in enumerate(entries):
        try:
            annotation = decode_annotation(index, entry, size)
            annotations.append(annotation)
            runs = rle.Runs(annotation.rle)
        except ValueError as error:
            text = str(error)
            faults.append(text if text.startswith("annotation") else f"annotation {index}: {text}")
            continue
        faults += [f"annotation {index}: {fault}" for fault in _mismatches(annotation, runs, size)]
    return annotations, faults


def _mismatches(annotation: Annotation, runs: rle.Runs, size: tuple[int, int]) -> Iterable[str]:
    area = runs.area
    x0, y0, x1, y1 = runs.box()
    box = (x0, y0, x1 - x0, y1 - y0)
    if area == 0:
        yield "its mask is empty"
    if annotation.area != area:
        yield f"its area is {annotation.area:g}, that of its RLE {area}"
    if np.abs(np.subtract(annotation.bbox, box)).max() > 1:
        yield f"its bbox is {list(annotation.bbox)}, that of its RLE {list(box)}"
    for name, highest in HIGHEST.items():
        value = getattr(annotation, name)
        if value is not None and not 0 <= value <= highest:
            yield f"its {name} is {value:g}, expected 0 to {highest:g}"
    for x, y in annotation.point_coords or ():
        if not (0 <= x <= size[1] and 0 <= y <= size[0]):
            yield f"its point ({x:g}, {y:g}) is outside the image"
    if (crop := annotation.crop_box) is not None and not (
        min(crop) >= 0 and crop[0] + crop[2] <= size[1] + 1 and crop[1] + crop[3] <= size[0] + 1
    ):
        yield f"its crop_box {list(crop)} is outside the image"
