"""Which part of an image a training sample shows, and how large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sam_train.ops.coords import View, preprocess_shape


class Crop(Protocol):
    """Chooses a window of an image."""

    def __call__(
        self, size: tuple[int, int], boxes: np.ndarray, img_size: int, rng: np.random.Generator
    ) -> View:
        """A window and the size to which it is resized.

        Args:
            size: (H, W) of the image.
            boxes: (M, 4) xyxy of the masks that may be drawn, original frame; M > 0.
            img_size: the side of the model input, which the resized window does not exceed.
            rng: the sample's own.
        """
        ...


def whole_image(
    size: tuple[int, int], boxes: np.ndarray, img_size: int, rng: np.random.Generator
) -> View:
    """The `Crop` that takes all and resizes the longest side to the model input."""
    height, width = size
    return View(window=(0, 0, width, height), resized=preprocess_shape(height, width, img_size))


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter:
    """Resizes by a random factor, then crops what is too large; what is smaller gets padded.

    Ghiasi et al. 2021, "Simple Copy-Paste"; SAM's stages 1 and 2 train with it.

    Attributes:
        scale: range of the factor, drawn uniformly; 1 makes the longest side fill the model input.
    """

    scale: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is (low, high) with 0 < low <= high, got {self.scale}")

    def __call__(
        self, size: tuple[int, int], boxes: np.ndarray, img_size: int, rng: np.random.Generator
    ) -> View:
        scaled = preprocess_shape(*size, max(1, round(img_size * rng.uniform(*self.scale))))
        resized = min(scaled[0], img_size), min(scaled[1], img_size)
        # The window is chosen before the resizing, so that only what is kept gets resized.
        height, width = (
            max(1, round(side * part / whole))
            for side, part, whole in zip(size, resized, scaled, strict=True)
        )
        y0 = int(rng.integers(size[0] - height + 1))
        x0 = int(rng.integers(size[1] - width + 1))
        return View(window=(x0, y0, x0 + width, y0 + height), resized=resized)


@dataclass(frozen=True, kw_only=True)
class ObjectZoom:
    """Crops a square round one randomly drawn mask, so that small objects become learnable.

    Attributes:
        prob: how often; otherwise the whole image.
        object_share: range of the object's longer side, as a share of the crop's side; drawn
            log-uniformly. An object that is larger in the whole image leaves that as it is.
        max_scale: no original pixel becomes wider than this many input pixels.
    """

    prob: float = 0.5
    object_share: tuple[float, float] = (0.1, 0.6)
    max_scale: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise ValueError(f"prob is a probability in [0, 1], got {self.prob}")
        if not 0 < self.object_share[0] <= self.object_share[1] <= 1:
            raise ValueError(
                f"object_share is (low, high) with 0 < low <= high <= 1, got {self.object_share}"
            )

    def __call__(
        self, size: tuple[int, int], boxes: np.ndarray, img_size: int, rng: np.random.Generator
    ) -> View:
        x0, y0, x1, y1 = boxes[rng.integers(len(boxes))]
        low, high = np.log(self.object_share)
        share = np.exp(rng.uniform(low, high))
        side = max(max(x1 - x0, y1 - y0) / share, img_size / self.max_scale)
        if rng.random() >= self.prob or side >= max(size):
            return whole_image(size, boxes, img_size, rng)
        top, height = _around(y0, y1, round(side), size[0], rng)
        left, width = _around(x0, x1, round(side), size[1], rng)
        return View(
            window=(left, top, left + width, top + height),
            resized=preprocess_shape(height, width, img_size),
        )


def _around(
    start: float, end: float, side: int, limit: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Start and length of a random window of `side` in [0, limit) that holds [start, end)."""
    length = min(side, limit)
    lowest = max(0, int(np.ceil(end)) - length)
    highest = max(lowest, min(int(start), limit - length))
    return int(rng.integers(lowest, highest + 1)), length
