"""Copies of registered images in the engine's folder, where that was asked for: the originals may go then."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from data_engine.images import image_bytes, image_pixels
from data_engine.records import Image, Rle
from data_engine.truth import UnknownTruthError
from sam_train.data.shards import json_content
from sam_train.ops import rle
from sam_train.ops.files import write_atomically
from sam_train.structures import Annotation, ImageRecord

FOLDER = "images"
"""Of the engine's: `HASH/NAME.jpg`, byte for byte, and `HASH/NAME.json` with the masks that are known of it."""
DIGITS = 16
"""Of a hash in the name of a folder."""


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Makes copies, named by what is in them, so that making one again changes nothing.

    Attributes:
        folder: where they go, absolute.
        truth: the masks that are known of an image; what it raises `UnknownTruthError` for has none.
    """

    folder: Path
    truth: Callable[[Image], Sequence[Rle]]

    def has(self, image: Image) -> bool:
        """Whether an image is registered as such a copy."""
        return Path(image.path).parent == self._place(image)

    def keep(self, image: Image) -> Image:
        """Copies an image, and its masks, and returns it as it is to be registered.

        Raises:
            ImageGoneError: it cannot be read, or has changed.
            OSError: the copy cannot be written.
        """
        path = self._place(image) / PurePosixPath(image.member or image.path).name
        data = image_bytes(image)
        try:
            masks = self.truth(image)
        except UnknownTruthError:
            pass
        else:
            write_atomically(path.with_suffix(".json"), _json(image, path.name, masks))
        write_atomically(path, lambda unfinished: unfinished.write_bytes(data))
        return replace(image, path=os.fspath(path), member=None, offset=None)

    def _place(self, image: Image) -> Path:
        return self.folder / image.id[:DIGITS]


def _json(image: Image, file_name: str, masks: Sequence[Rle]) -> str:
    annotations = [
        Annotation(id=i, rle=one, bbox=rle.bbox(one), area=rle.area(one))
        for i, one in enumerate(masks)
    ]
    record = ImageRecord(image.key, image.size, annotations, lambda: image_pixels(image))
    return json.dumps(json_content(record, image_id=0, file_name=file_name), separators=(",", ":"))


def copies_of(root: Path, image_id: str) -> Iterator[Path]:
    """The files of one image's copy, and what a killed process left of them."""
    yield from sorted((root / FOLDER / image_id[:DIGITS]).glob("*"))
