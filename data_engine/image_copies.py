"""Copies of registered images in the engine's folder, where that was asked for: the originals may go then."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from data_engine.images import COPIES, DIGITS, image_bytes, image_pixels, is_copy
from data_engine.mask_store.store import Store
from data_engine.records import Image, Rle
from data_engine.truth import UnknownTruthError
from sam_train.data.image_files import SUFFIXES
from sam_train.data.shards import json_content
from sam_train.ops import rle
from sam_train.ops.files import write_atomically
from sam_train.structures import Annotation, ImageRecord

log = logging.getLogger(__name__)

LONGEST_NAME = 200
"""Bytes of a file's name, so that a temporary one beside it may be longer."""
PNG = b"\x89PNG"
PLACE = "place.txt"
"""File that says where the folder was when its images were registered."""


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Makes copies, in folders named by what is in them, so that making one again changes nothing.

    Attributes:
        root: the engine's folder, absolute.
        truth: the masks that are known of an image; what it raises `UnknownTruthError` for has none.
    """

    root: Path
    truth: Callable[[Image], Sequence[Rle]]

    def has(self, image: Image) -> bool:
        """Whether an image is registered as a copy of this engine's, which is there with its masks."""
        path = Path(image.path)
        return (
            is_copy(image)
            and path.parent.parent == self.root / COPIES
            and path.is_file()
            and path.with_suffix(".json").is_file()
        )

    def keep(self, image: Image) -> Image:
        """Copies an image from where it is, and its masks, and returns it as it is to be registered.

        Raises:
            ImageGoneError: it cannot be read, or has changed.
            OSError: the copy cannot be written.
        """
        data = image_bytes(image)
        path = self.root / COPIES / image.id[:DIGITS] / _file_name(image, data)
        _note_place(self.root)
        if (masks := self._masks(image, path.name)) is not None:
            write_atomically(path.with_suffix(".json"), masks)
        write_atomically(path, lambda unfinished: unfinished.write_bytes(data))
        return replace(image, path=os.fspath(path), member=None, offset=None)

    def _masks(self, image: Image, file_name: str) -> str | None:
        try:
            masks = self.truth(image)
            annotations = [
                Annotation(id=i, rle=one, bbox=rle.bbox(one), area=rle.area(one))
                for i, one in enumerate(masks)
            ]
        except UnknownTruthError:
            return None
        except ValueError as error:
            log.warning("%s: its masks are damaged and not copied: %s", file_name, error)
            return None
        record = ImageRecord(image.key, image.size, annotations, lambda: image_pixels(image))
        content = json_content(record, image_id=0, file_name=file_name)
        return json.dumps(content, separators=(",", ":"))


def _file_name(image: Image, data: bytes) -> str:
    """Its own, where that is one of an image and not too long."""
    own = PurePosixPath(image.member or image.path)
    if own.suffix.lower() in SUFFIXES and len(os.fsencode(own.name)) <= LONGEST_NAME:
        return own.name
    suffix = ".png" if data.startswith(PNG) else ".jpg"
    return image.id[:DIGITS] + suffix


def _note_place(root: Path) -> None:
    path = root / COPIES / PLACE
    if not path.is_file():
        write_atomically(path, f"{root}\n")


def follow(store: Store, root: Path) -> None:
    """Registers copies where they now are, if the engine's folder has moved."""
    path = root / COPIES / PLACE
    if not path.is_file() or path.read_text(encoding="utf-8") == f"{root}\n":
        return
    for image in list(store.images()):
        here = root / COPIES / Path(image.path).parent.name / Path(image.path).name
        if is_copy(image) and here.is_file():
            store.put_image(replace(image, path=os.fspath(here)))
    write_atomically(path, f"{root}\n")
    log.info("%s has moved, and its copies of images with it", root)


def copies_of(root: Path, image_id: str) -> Iterator[Path]:
    """The files of one image's copy, and what a killed process left of them."""
    yield from sorted((root / COPIES / image_id[:DIGITS]).glob("*"))


def all_copies(root: Path) -> Iterator[Path]:
    """The folders of all copies."""
    for path in (root / COPIES).glob("*"):
        if len(path.name) == DIGITS and path.is_dir():
            yield path
