"""A folder of images and a folder of masks: index images, colour images, or one file per object."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam_train.data.file_lists import Names, files_below, make_texts
from sam_train.data.image_files import (
    SUFFIXES,
    check_size,
    header_size,
    labels_of,
    read_image,
    read_mask_file,
    read_reduced,
)
from sam_train.data.label_images import annotations_of
from sam_train.data.mask_kinds import KINDS, Kind, kind_of, whiteness
from sam_train.data.mask_matching import match_masks, unique_keys
from sam_train.structures import Annotation, ImageRecord

log = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """What lies in the folders.

    Attributes:
        kind: of all the masks.
        images, masks: paths.
        keys: the images' names.
        bounds: (N + 1,) which of `masks` are an image's.
    """

    kind: Kind
    images: Names
    masks: Names
    keys: Names
    bounds: np.ndarray


JPEG_BLACK = 0.1
"""How white a black mask's pixels may be once a JPEG of low quality has held them."""


@dataclass(frozen=True, kw_only=True)
class FolderItems:
    """Images with masks beside them, as `Items`. Which masks are an image's: see `match_masks`.

    Attributes:
        images: a folder, or a glob of folders or files.
        masks: likewise.
        kind: "index" (a pixel's value, or its index in the palette, is its object), "colour" (its colour
            is; black and what is transparent are background), "objects" (each file is one object), or
            "auto", which looks at some of the files and holds the others against them: see `Kind`.
        threshold: of "objects": what of full white (1, 255 or 65535) a pixel of the object exceeds. A file
            with transparency counts by its alpha if its colour is the same all over.
        background: of "index": values that are no object.
        components: whether parts that do not touch are objects of their own.
    """

    images: str
    masks: str
    kind: str = "auto"
    threshold: float = 0.5
    background: Sequence[int] = (0,)
    components: bool = False

    def __post_init__(self) -> None:
        make_texts(self, "images", "masks")
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold is a share of full white in [0, 1), got {self.threshold}")

    @cached_property
    def pairs(self) -> Pairs:
        """Looks for the files; what stays alone is named in the log."""
        images, masks = _files(self.images, "images"), _files(self.masks, "masks")
        # In one folder for both, as in `*/`, a mask is no image.
        taken = set(masks)
        images = [path for path in images if path not in taken]
        if not images:
            raise ValueError(
                f"images and masks are the same files, of {self.images}: tell them apart, as by "
                f"data.images='{self.images}/*.jpg' data.masks='{self.masks}/*_mask.png'"
            )
        found = match_masks(images, masks, files_below(self.masks, SUFFIXES)[0])
        _report("image", "a mask", [image for image, own in found.owned.items() if not own])
        _report("mask", "an image", found.alone)
        owned = {image: own for image, own in found.owned.items() if own}
        if not owned:
            raise FileNotFoundError(
                f"no mask in {self.masks} belongs to an image in {self.images}: expected the same names "
                "(a.jpg, a.png), names that begin with the image's (a_1.png), or a folder of that name "
                f"(a/1.png); got {Path(images[0]).name} and {Path(masks[0]).name}"
            )
        kind = kind_of(list(owned.values()), self.masks) if self.kind == "auto" else Kind(self.kind)
        if kind.name != "objects" and (several := [i for i, own in owned.items() if len(own) > 1]):
            raise ValueError(
                f"kind={kind.name} wants one mask file an image, {several[0]} has {len(owned[several[0]])}"
            )
        roots = files_below(self.images, SUFFIXES)[0]
        return Pairs(
            kind,
            Names(owned),
            Names(path for own in owned.values() for path in own),
            Names(unique_keys(roots, list(owned))),
            np.cumsum([0, *map(len, owned.values())]),
        )

    @cached_property
    def _dark(self) -> list[str]:
        """The first file that was taken for black though it is not all 0: that is said once."""
        return []

    def __len__(self) -> int:
        return len(self.pairs.images)

    def describe(self, index: int) -> str:
        """See `Items`."""
        return self.pairs.keys[index]

    def record(self, index: int) -> ImageRecord:
        """See `Items`."""
        path = Path(self.pairs.images[index])
        size = header_size(path)
        start, end = self.pairs.bounds[index : index + 2].tolist()
        annotations = [
            annotation
            for place in range(start, end)
            for annotation in self._annotations(Path(self.pairs.masks[place]), size)
        ]
        return ImageRecord(
            key=self.describe(index),
            size=size,
            annotations=tuple(replace(one, id=number) for number, one in enumerate(annotations)),
            load=partial(read_image, path, size),
            load_reduced=partial(read_reduced, path, size),
            read_file=path.read_bytes,
        )

    def _annotations(self, path: Path, size: tuple[int, int]) -> tuple[Annotation, ...]:
        kind = self.pairs.kind
        image = read_mask_file(path)
        check_size(path, image, size)
        kind.check(path, image)
        if kind.name != "objects":
            labels = labels_of(path, image, colour=kind.name == "colour")
            background = self.background if kind.name == "index" else (0,)
            return annotations_of(labels, background=background, components=self.components)
        white = whiteness(image)
        mask = white > self.threshold
        if not mask.any() and white.any():
            # Some number their files, or write a class, where others write white. What a JPEG leaves of
            # black is darker than that, and of several values.
            several = len(np.unique(white[white > 0])) > 1
            if several and white.max() > JPEG_BLACK:
                raise ValueError(
                    f"no pixel of {path.name} exceeds threshold={self.threshold} of full white, and it "
                    "holds several darker values: kind=index, or a lower threshold"
                )
            if several and kind.reason and not self._dark:
                self._dark.append(path.name)
                log.warning(
                    "%s, and maybe others, counts as black: no value in it is above %.0f %% of white. "
                    "Where such values number objects, say data.train.items.kind=index",
                    path,
                    100 * JPEG_BLACK,
                )
            mask = (white > 0) & (not several)
        return annotations_of(mask.astype(np.uint8), components=self.components)


def _files(path: str, what: str) -> list[str]:
    try:
        root, names = files_below(path, SUFFIXES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} of {what} (data.{what}=DIR)") from None
    if not names:
        raise FileNotFoundError(
            f"{path} holds no {what}: expected files of {', '.join(sorted(SUFFIXES))} (data.{what}=DIR)"
        )
    return [str(Path(root) / name) for name in names]


def _report(what: str, lacks: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        plural = "s are" if len(names) > 1 else " is"
        log.warning("%d %s%s left out for want of %s: %s", len(names), what, plural, lacks, shown)
