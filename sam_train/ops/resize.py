"""Resizes pictures to the model input; nothing else decides how."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sam_train.ops.coords import preprocess_shape


def resize_longest_side(image: np.ndarray, long_side: int) -> np.ndarray:
    """Scales a picture so that its longest side is `long_side`, bilinear with antialiasing.

    On uint8 and by Pillow, as segment_anything's ResizeLongestSide: resizing floats, or by another
    library, gives pixels a level or two away.

    Args:
        image: (H, W, C) uint8.
        long_side: pixels.

    Returns:
        (h, w, C) uint8.
    """
    height, width = preprocess_shape(image.shape[0], image.shape[1], long_side)
    if image.shape[2] == 3:
        return _resized(image, width, height)
    channels = [_resized(image[..., c], width, height) for c in range(image.shape[2])]
    return np.stack(channels, axis=2)


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized)
