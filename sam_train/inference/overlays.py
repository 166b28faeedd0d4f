"""A picture of an image with its annotations, whatever the size of either."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from sam_train.ops.coords import to_input_frame
from sam_train.ops.drawing import (
    distinct_colors,
    draw_boxes,
    draw_points,
    overlay_masks,
)
from sam_train.ops.resize import resize_longest_side
from sam_train.ops.rle import decode
from sam_train.structures import Annotation

MASKS_AT_ONCE = 16


def draw_annotations(
    image: np.ndarray, annotations: Sequence[Annotation], *, longest_px: int
) -> np.ndarray:
    """Tints the masks, the largest first, and draws the prompts that asked for them.

    Only a few masks are held at a time, and of them one at the image's size.

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
    colors = distinct_colors(len(annotations))
    order = sorted(range(len(annotations)), key=lambda i: -annotations[i].area)
    for start in range(0, len(order), MASKS_AT_ONCE):
        chosen = order[start : start + MASKS_AT_ONCE]
        masks = np.stack([_mask(annotations[i], size) for i in chosen])
        image = overlay_masks(image, masks, colors=[colors[i] for i in chosen])
    radius_px = max(4, max(size) // 120)
    for annotation in annotations:
        if "input_box" in annotation.extra:
            box = np.array(annotation.extra["input_box"], float)
            image = draw_boxes(image, to_input_frame(box, original_size, size)[None])
        # A generator's own points, which have no labels, would hide its masks.
        labels = annotation.extra.get("point_labels")
        if annotation.point_coords is not None and labels is not None:
            coords = np.array(annotation.point_coords, float)
            coords = to_input_frame(coords, original_size, size)
            image = draw_points(image, coords, labels, radius_px=radius_px)
    return image


def _mask(annotation: Annotation, size: tuple[int, int]) -> np.ndarray:
    """The (h, w) bool mask of the pixels that are covered by half at least."""
    mask = decode(annotation.rle)
    if mask.shape == size:
        return mask
    shares = cv2.resize(
        mask.astype(np.uint8) * 255, (size[1], size[0]), interpolation=cv2.INTER_AREA
    )
    return shares > 127
