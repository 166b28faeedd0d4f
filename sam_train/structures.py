"""The records at every seam: what one part of the project hands to the next.

Letters used throughout: N images, P prompts (one object each), M candidate masks, S the side of the
square model input. Points are (x, y), boxes are xyxy, sizes are (H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

PADDING, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3
"""The point labels of `Prompts`, as in the published prompt encoder and its ONNX form."""


Cursor = tuple[Any, ...]
"""Where a stream of records goes on: plain numbers, nested; () is its beginning."""


class Prompts(NamedTuple):
    """What the annotator has said so far about P objects.

    A prompt of points alone ends in exactly one `PADDING` point, and a box is its two corners without
    padding: point-first and box-first objects thus share one N, and both equal the published encoder.

    Attributes:
        point_coords: (P, N, 2) float, (x, y) pixel indices in the frame the giver states (the prompt
            encoder takes the model input frame and moves to pixel centres itself).
        point_labels: (P, N) int64, one of the labels above.
        mask_inputs: (P, 1, h, w) logits of an earlier answer, or None.
    """

    point_coords: Tensor
    point_labels: Tensor
    mask_inputs: Tensor | None = None


class ImageFeatures(NamedTuple):
    """An encoded batch of images.

    Attributes:
        image_embeddings: (N, C, h, w) float.
    """

    image_embeddings: Tensor


class MaskPrediction(NamedTuple):
    """The decoder's answer for P prompts with M candidates each.

    Attributes:
        low_res_masks: (P, M, h, w) logits; threshold at 0.
        iou_predictions: (P, M) float, the predicted IoU of each candidate.
    """

    low_res_masks: Tensor
    iou_predictions: Tensor


class DetectedBoxes(NamedTuple):
    """What a detector found in one image, best first.

    Attributes:
        boxes: (K, 4) float xyxy edges, original frame.
        scores: (K,) float, in [0, 1].
    """

    boxes: Tensor
    scores: Tensor


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One mask of an image, as in SA-1B's JSON; original frame.

    Attributes:
        rle: COCO run lengths, {"size": [H, W], "counts": compressed string}.
        bbox: (x, y, w, h) in pixels.
        predicted_iou, stability_score, point_coords: absent (None) on human masks.
        extra: every other key of the JSON, kept as it came.
    """

    id: int
    rle: Mapping[str, Any]
    bbox: tuple[float, float, float, float]
    area: float
    predicted_iou: float | None = None
    stability_score: float | None = None
    point_coords: tuple[tuple[float, float], ...] | None = None
    crop_box: tuple[float, float, float, float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageRecord:
    """One image with its masks at original resolution; pixels are decoded when first looked at.

    Attributes:
        key: names the image within its source.
        size: (H, W) as the metadata states it.
        annotations: the image's masks.
        load: returns the (H, W, 3) uint8 RGB pixels.
        read_file: returns the image file's bytes, None where the pixels come from no single file.
        load_reduced: returns them at 1/n of the size, rounded up, given a largest n (1, 2, 4 or 8), and
            the n it took: pixel i covers [n * i, n * (i + 1)) of the original. As an RGB picture of
            Pillow's where they were just decoded, as what follows is mostly its resizing. None where
            `load` is as quick.
        source: the data set's name, for logs and per-source scores.
        damaged: takes the reason why this record cannot be used after all and returns what to raise.
        cursor: where the stream that gave this record goes on after it.
        epoch: how often its own source was gone through before, where a mixture draws from several.
    """

    key: str
    size: tuple[int, int]
    annotations: Sequence[Annotation]
    load: Callable[[], np.ndarray]
    source: str = ""
    damaged: Callable[[object], Exception] = ValueError
    cursor: Cursor = ()
    epoch: int = 0
    read_file: Callable[[], bytes] | None = None
    load_reduced: Callable[[int], tuple[np.ndarray | Image, int]] | None = None

    @cached_property
    def image(self) -> np.ndarray:
        """The (H, W, 3) uint8 RGB pixels."""
        return self.load()

    def reduced_image(self, shrink: int) -> tuple[np.ndarray | Image, int]:
        """The pixels at 1/n of the size, and n, at most `shrink`; see `load_reduced`."""
        if self.load_reduced is None or "image" in self.__dict__:
            return self.image, 1
        while shrink > min(self.size):  # of a side of 5 pixels Pillow makes no eighth
            shrink //= 2
        return self.load_reduced(shrink)


class ImageSample(NamedTuple):
    """One image ready for training.

    Attributes:
        key: the record's key.
        image: (3, H, W) uint8 RGB, resized to the model input, not padded.
        masks: (M, h, w) bool on the mask grid of the padded square input.
        boxes: (M, 4) float xyxy, model input frame.
        input_size: (H, W) of `image`.
        original_size: (H, W) before any transform.
        seed: what everything random about this sample derives from: (seed, epoch, key) hashed.
    """

    key: str
    image: Tensor
    masks: Tensor
    boxes: Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int]
    seed: int


class ImageBatch(NamedTuple):
    """Images packed with all their masks: P masks of N images, concatenated, none repeated.

    Attributes:
        images: (N, 3, S, S) uint8 RGB, zero-padded at the bottom and right.
        input_sizes: (N, 2) int64 (H, W) of the part that is not padding.
        masks: (P, h, w) bool.
        boxes: (P, 4) float xyxy, model input frame.
        image_index: (P,) int64, the image each mask belongs to, in order.
        keys: N names.
        seeds: N seeds.
    """

    images: Tensor
    input_sizes: Tensor
    masks: Tensor
    boxes: Tensor
    image_index: Tensor
    keys: tuple[str, ...]
    seeds: tuple[int, ...]
