"""Scenes with known masks, made when they are asked for: training data that no one has to download.

Scene i of a split follows from the seed alone, so every reader, process and machine makes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import cv2
import numpy as np
from numpy.random import Generator

from sam_train.data.synthetic_canvas import Canvas, photograph
from sam_train.data.synthetic_layouts import LAYOUTS
from sam_train.ops import rle
from sam_train.structures import Annotation, Cursor, ImageRecord

MIN_AREA_PX = 40
MIN_VISIBLE_SHARE = 0.15
MAX_MASKS = 20
FEWEST_MASKS = 2
MAX_TRIES = 8
# The first word of every seed sequence: no two streams of random numbers share it by accident.
ORDER_STREAM = 0
SCENE_STREAMS = {"train": 1, "val": 2}


def make_scene(rng: Generator, size: tuple[int, int] | int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draws a scene.

    Args:
        size: (H, W) in pixels, or the side of a square. Things grow with the shorter side.

    Returns:
        The image, (H, W, 3) uint8 RGB, and its 2 to 20 masks, each (H, W) bool. A mask is what can be
        seen of a thing, a part or a region: two masks are apart, or one includes the other, but for
        the shadows of X-rays, which overlap.
    """
    size = (size, size) if isinstance(size, int) else size
    layouts, shares = zip(*LAYOUTS, strict=True)
    min_area_px = MIN_AREA_PX * size[0] * size[1] / 256**2
    for _ in range(MAX_TRIES):
        canvas = Canvas(rng, size)
        grey = layouts[rng.choice(len(layouts), p=shares)](rng, canvas)
        masks = canvas.visible_masks(min_area_px, MIN_VISIBLE_SHARE)
        if len(masks) >= FEWEST_MASKS:
            break
    if len(masks) > MAX_MASKS:
        masks = [masks[i] for i in sorted(rng.permutation(len(masks))[:MAX_MASKS])]
    return photograph(rng, canvas.image, grey=grey), masks


@dataclass(frozen=True, kw_only=True)
class SyntheticSource:
    """A `Source` of synthetic scenes.

    Attributes:
        num_scenes: how many there are in the split; an epoch shows each once.
        size: (H, W) of the scenes in pixels, or the side of a square.
        seed: what all scenes, and their order in each epoch, follow from.
        split: scenes of "train" and "val" never coincide, whatever the seed.
        name: the records' source.
        cache_mb: scenes kept in memory, by all readers together. A reader keeps what it meets first.
    """

    num_scenes: int
    size: tuple[int, int] | int = 256
    seed: int = 0
    split: Literal["train", "val"] = "train"
    name: str = field(default="synthetic", compare=False)
    cache_mb: float = field(default=0, compare=False)
    _cache: dict[int, ImageRecord] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.split not in SCENE_STREAMS:
            raise ValueError(f"split is one of {', '.join(SCENE_STREAMS)}, got {self.split!r}")
        if self.seed < 0:
            raise ValueError(f"seed is at least 0, got {self.seed}")
        if self.num_scenes < 1:
            raise ValueError(f"num_scenes is at least 1, got {self.num_scenes}")
        if min(self._height_width) < 32:
            raise ValueError(f"size is at least 32 pixels a side, got {self.size}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}  # left behind when sent to another process

    @property
    def _height_width(self) -> tuple[int, int]:
        if isinstance(self.size, int):
            return self.size, self.size
        height, width = self.size
        return int(height), int(width)

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool, start: Cursor = ()
    ) -> Iterator[ImageRecord]:
        """This reader's share of an epoch: every `num_readers`-th scene of the epoch's order."""
        order = np.arange(self.num_scenes)
        if shuffle:
            order = np.random.default_rng([ORDER_STREAM, epoch, self.seed]).permutation(order)
        height, width = self._height_width
        keep = int(self.cache_mb * 2**20 / num_readers / (3 * height * width))
        (num_done,) = start or (0,)
        mine = order[reader::num_readers][num_done:].tolist()
        for place, index in enumerate(mine, start=num_done + 1):
            record = self._cache.get(index) or self.record(index)
            if len(self._cache) < keep:
                self._cache[index] = record
            yield replace(record, cursor=(place,))

    def record(self, index: int) -> ImageRecord:
        """Makes scene `index` of the split."""
        rng = np.random.default_rng([SCENE_STREAMS[self.split], index, self.seed])
        image, masks = make_scene(rng, self._height_width)
        image.setflags(write=False)
        return ImageRecord(
            key=f"scene-{self.split}-{index:06d}",
            size=self._height_width,
            annotations=_annotations(masks, first_id=index * MAX_MASKS),
            load=partial(np.asarray, image),
            source=self.name,
        )


def _annotations(masks: list[np.ndarray], first_id: int) -> tuple[Annotation, ...]:
    boxes = (cv2.boundingRect(mask.view(np.uint8)) for mask in masks)
    return tuple(
        Annotation(
            id=first_id + i,
            rle=rle.encode(mask),
            bbox=(float(x), float(y), float(w), float(h)),
            area=float(np.count_nonzero(mask)),
        )
        for i, (mask, (x, y, w, h)) in enumerate(zip(masks, boxes, strict=True))
    )
