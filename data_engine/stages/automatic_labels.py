"""One image of the automatic stage: blurred if so wished, segmented, its masks signed."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from data_engine.filters import Limits, usable
from data_engine.image_shards import ShardImage
from sam_train.data.shards import encode_record, json_content
from sam_train.inference.automatic import AutomaticSegmenter
from sam_train.structures import ImageRecord

SOURCE = "automatic"
"""What such masks say of where they come from."""


class Labelled(NamedTuple):
    """An image with its masks, as it is written.

    Attributes:
        data: the image file.
        content: of its JSON.
        num_masks: in it.
        rejects: how many were left out after the generator's own filters, by reason.
        is_overfull: see `Limits`.
        model_s: seconds in the mask generator.
    """

    data: bytes
    content: dict[str, Any]
    num_masks: int
    rejects: Counter[str]
    is_overfull: bool
    model_s: float


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """Labels one image after the other.

    Attributes:
        segmenter: finds the masks.
        before: what pixels go through first, see `AutomaticStage`; None: nothing.
        quality: of a JPEG that is encoded anew.
        limits: of what an image may have.
        model, round_number: that the masks are signed with.
    """

    segmenter: AutomaticSegmenter
    before: Callable[[np.ndarray], np.ndarray] | None
    quality: int
    limits: Limits
    model: str
    round_number: int

    def label(self, image: ShardImage, first_id: int) -> Labelled:
        """Labels an image; its masks are numbered from `first_id`."""
        pixels, data = image.pixels, image.data
        if self.before is not None:
            pixels = self._changed(image)
            data = self._encoded(image, pixels)
        start = time.perf_counter()
        found = self.segmenter.segment(pixels)
        model_s = time.perf_counter() - start
        kept, rejects = usable(found)
        extra = {"source": SOURCE, "round": self.round_number, "model": self.model}
        signed = [replace(own, id=first_id + i, extra=extra) for i, own in enumerate(kept)]
        size = (pixels.shape[0], pixels.shape[1])
        content = json_content(
            ImageRecord(image.key, size, signed, lambda: pixels),
            image_id=zlib.crc32(image.key.encode()),
            file_name=f"{image.key}.{image.suffix}",
        )
        content["image"] |= image.info
        is_overfull = self.limits.is_overfull(kept, size)
        return Labelled(data, content, len(kept), rejects, is_overfull, model_s)

    @property
    def image_files(self) -> str:
        """What is done to the image files, in words."""
        if self.before is None:
            return "untouched"
        named: Any = getattr(self.before, "func", self.before)  # what a partial calls
        named = named if hasattr(named, "__qualname__") else type(named)
        return f"encoded anew after {named.__module__}.{named.__qualname__}"

    def _changed(self, image: ShardImage) -> np.ndarray:
        assert self.before is not None
        shape = image.pixels.shape
        pixels: Any = self.before(image.pixels.copy())
        if (
            isinstance(pixels, np.ndarray)
            and pixels.shape == shape
            and pixels.dtype == image.pixels.dtype
        ):
            return pixels
        kind, got = getattr(pixels, "dtype", type(pixels).__name__), getattr(pixels, "shape", "")
        raise ValueError(
            f"expected before to return the {shape} uint8 pixels of an image, got {kind} {got} for "
            f"{image.key}"
        )

    def _encoded(self, image: ShardImage, pixels: np.ndarray) -> bytes:
        record = ImageRecord(image.key, (pixels.shape[0], pixels.shape[1]), (), lambda: pixels)
        return encode_record(record, suffix=image.suffix, quality=self.quality)[image.suffix]
