"""Flips and colour changes of a training sample, as config choices."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import cv2
import numpy as np

from sam_train.ops.coords import View

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in a grey value, ITU-R BT.601."""


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Mirrors and turns, each with its probability.

    Attributes:
        horizontal: left and right swapped.
        vertical: top and bottom swapped; for images without an up, as microscopy.
        transpose: x and y swapped; with both flips, all eight right-angled positions occur.
    """

    horizontal: float = 0.5
    vertical: float = 0.0
    transpose: float = 0.0

    def __post_init__(self) -> None:
        _check_probabilities(self, "horizontal", "vertical", "transpose")

    def __call__(self, view: View, rng: np.random.Generator) -> View:
        horizontal, vertical, transpose = (
            rng.random(3) < (self.horizontal, self.vertical, self.transpose)
        ).tolist()
        return replace(view, flip_x=horizontal, flip_y=vertical, transpose=transpose)


@dataclass(frozen=True, kw_only=True)
class ColourJitter:
    """Random brightness, contrast, saturation, grey and inversion, as one 3 x 4 colour matrix.

    Attributes:
        brightness, contrast, saturation: factors are uniform in [1 - value, 1 + value].
        grey: probability of dropping colour altogether.
        invert: probability of turning light into dark, as between microscopy methods.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    grey: float = 0.0
    invert: float = 0.0

    def __post_init__(self) -> None:
        _check_probabilities(self, *(field.name for field in fields(self)))

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 RGB to the same; values out of range are clipped once, at the end."""
        spread = np.array([self.brightness, self.contrast, self.saturation])
        brightness, contrast, saturation = 1 + spread * rng.uniform(-1, 1, 3)
        is_grey, is_inverted = (rng.random(2) < (self.grey, self.invert)).tolist()
        matrix = _saturation(0.0 if is_grey else saturation) * brightness
        mean = LUMA @ (matrix @ np.array(cv2.mean(image)[:3]))
        matrix, offset = matrix * contrast, (1 - contrast) * mean
        if is_inverted:
            matrix, offset = -matrix, 255 - offset
        return cv2.transform(image, np.column_stack([matrix, np.full(3, offset)]))


def _saturation(factor: float) -> np.ndarray:
    return factor * np.eye(3) + (1 - factor) * np.tile(LUMA, (3, 1))


def _check_probabilities(owner: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(owner, name) <= 1:
            raise ValueError(f"{name} is in [0, 1], got {getattr(owner, name)}")
