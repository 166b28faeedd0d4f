"""`predictor.transform`: images and prompts to the model input frame, under segment_anything's names."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.ops.coords import preprocess_shape, to_input_frame
from sam_train.ops.resize import resize_longest_side


class ResizeLongestSide:
    """Scales so that an image's longest side fills the model input.

    Args:
        target_length: side of the square model input, pixels.
    """

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) uint8 to the (h, w, C) uint8 the model is shown, not padded."""
        return resize_longest_side(image, self.target_length)

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Points (..., 2), (x, y) in the original frame of this (H, W), to the model input frame."""
        size, resized = self._sizes(original_size)
        return to_input_frame(np.asarray(coords, float), size, resized)

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Boxes (..., 4) xyxy likewise, as (n, 4)."""
        return self.apply_coords(np.reshape(boxes, (-1, 4)), original_size)

    def apply_image_torch(self, image: Tensor) -> Tensor:
        """(N, C, H, W) floats to (N, C, h, w); within a level or two of `apply_image`, not the same.

        segment_anything's own takes N and C for the height and width here and distorts the image; this
        one does not.
        """
        size = preprocess_shape(image.shape[-2], image.shape[-1], self.target_length)
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords_torch(self, coords: Tensor, original_size: tuple[int, ...]) -> Tensor:
        """`apply_coords` for a tensor, to float32."""
        size, resized = self._sizes(original_size)
        return to_input_frame(coords.to(torch.float), size, resized)

    def apply_boxes_torch(self, boxes: Tensor, original_size: tuple[int, ...]) -> Tensor:
        """`apply_boxes` for a tensor, to float32."""
        return self.apply_coords_torch(boxes.reshape(-1, 4), original_size)

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """The (h, w) that an image of this height and width is resized to."""
        return preprocess_shape(oldh, oldw, long_side_length)

    def _sizes(self, original_size: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        height, width = original_size
        return (height, width), preprocess_shape(height, width, self.target_length)
