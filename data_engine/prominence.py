"""What catches an annotator's eye: how large a thing is, and how it stands out from what is round it."""

from __future__ import annotations

import cv2
import numpy as np

GLANCE_PX = 256
"""Longest side at which an image is looked at as a whole."""
RING_PX = 5


def contrast_levels(mask: np.ndarray, pixels: np.ndarray) -> float:
    """How far the mean colour of a thing is from that of what is round it.

    Args:
        mask: (H, W) bool.
        pixels: (H, W, 3) uint8.

    Returns:
        In grey levels, 0 to 255, the channel where it is farthest; 0 where nothing is round it.
    """
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    rows = slice(max(0, top - RING_PX), top + height + RING_PX)
    columns = slice(max(0, left - RING_PX), left + width + RING_PX)
    inside = np.ascontiguousarray(mask[rows, columns]).view(np.uint8)
    wide = cv2.dilate(inside, np.ones((2 * RING_PX + 1, 2 * RING_PX + 1), np.uint8))
    ring = wide - inside
    if not width or not ring.any():
        return 0.0
    window = np.ascontiguousarray(pixels[rows, columns])
    means = [cv2.mean(window, mask=where)[: window.shape[2]] for where in (inside, ring)]
    return float(np.abs(np.subtract(*means)).max())


def prominence(mask: np.ndarray, pixels: np.ndarray) -> float:
    """Size times contrast: the side of a square of a thing's area, by how it stands out."""
    side = np.sqrt(np.count_nonzero(mask))
    return float(side * (1.0 + contrast_levels(mask, pixels)))


def image_prominence(pixels: np.ndarray) -> float:
    """The prominence of the most prominent thing in an image, told without a model.

    The image is made small and split into light and dark (Otsu 1979); each connected part that the image's
    border does not cut on two sides or more counts as a thing.

    Args:
        pixels: (H, W, 3) uint8.

    Returns:
        As if every image filled the same screen: at least 0, comparable between images of any size.
    """
    scale = GLANCE_PX / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    small = cv2.GaussianBlur(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), (5, 5), 0)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    _, light = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    found = [0.0]
    for side in (light, 1 - light):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(side)
        # Of parts that are cut less than twice the largest few are enough.
        order = np.argsort(-stats[1:count, cv2.CC_STAT_AREA])[:8] + 1
        found += [
            prominence(labels == number, small)
            for number in order
            if _num_cuts(stats[number], grey.shape) < 2
        ]
    return max(found)


def _num_cuts(stats: np.ndarray, shape: tuple[int, ...]) -> int:
    """How many sides of the image a part touches."""
    left, top, width, height = (int(value) for value in stats[:4])
    return sum((left == 0, top == 0, left + width == shape[1], top + height == shape[0]))
