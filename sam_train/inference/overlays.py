"""A picture of an image with its annotations, whatever the size of either."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sam_train.ops.coords import to_input_frame
from sam_train.ops.drawing import (
    distinct_colors,
    draw_boxes,
    draw_points,
    overlay_masks,
)
from sam_train.ops.many_runs import ManyRuns
from sam_train.ops.resize import resize_longest_side
from sam_train.structures import Annotation

MASKS_AT_ONCE = 16


def draw_annotations(
    image: np.ndarray, annotations: Sequence[Annotation], *, longest_px: int
) -> np.ndarray:
    """Tints the masks, the largest first, and draws the prompts that asked for them.

    Only a few masks are held at a time, and at the picture's size.

    Args:
        image: (H, W, 3) uint8.
        annotations: of it.
        longest_px: a larger image is made this size.

    Returns:
        (h, w, 3) uint8.
    """
    original_size = (image.shape[0], image.shape[1])
    if max(original_size) > longest_px:
        image = resize_longest_side(image, longest_px)
    size = (image.shape[0], image.shape[1])
    edges = [np.linspace(0, length, n + 1) for length, n in zip(original_size, size, strict=True)]
    cell_px = (original_size[0] / size[0]) * (original_size[1] / size[1])
    colors = distinct_colors(len(annotations))
    order = sorted(range(len(annotations)), key=lambda i: -annotations[i].area)
    for start in range(0, len(order), MASKS_AT_ONCE):
        chosen = order[start : start + MASKS_AT_ONCE]
        covered = ManyRuns([annotations[i].rle for i in chosen]).coverage(
            range(len(chosen)), [edges[1]] * len(chosen), [edges[0]] * len(chosen)
        )
        masks = np.stack(covered) >= cell_px / 2
        image = overlay_masks(image, masks, colors=[colors[i] for i in chosen])
    radius_px = max(4, max(size) // 120)
    for annotation in annotations:
        if "input_box" in annotation.extra:
            box = np.array(annotation.extra["input_box"], float)
            image = draw_boxes(image, to_input_frame(box, original_size, size)[None])
        labels = annotation.extra.get(
            "point_labels"
        )  # a generator's own points would hide its masks
        if annotation.point_coords is not None and labels is not None:
            coords = np.array(annotation.point_coords, float)
            coords = to_input_frame(coords, original_size, size)
            image = draw_points(image, coords, labels, radius_px=radius_px)
    return image
