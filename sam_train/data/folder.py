"""A folder of images and a folder of masks: index images, colour images, or one file per object."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sam_train.data.file_lists import Names, files_below
from sam_train.data.image_files import (
    SUFFIXES,
    check_size,
    header_size,
    read_image,
    read_labels,
    read_mask_file,
)
from sam_train.data.label_images import annotations_of
from sam_train.data.mask_matching import match_masks, unique_keys
from sam_train.structures import Annotation, ImageRecord

log = logging.getLogger(__name__)

KINDS = ("auto", "index", "colour", "objects")
LOOKED_AT = 24
"""Mask files that are looked at to find out their kind."""

SOFT = 0.8
"""A grey mask is a soft one, not one of object numbers, if so many of its pixels above 0 are near white."""


class Pairs(NamedTuple):
    """What lies in the folders.

    Attributes:
        kind: "index", "colour" or "objects".
        images, masks: paths.
        keys: the images' names.
        bounds: (N + 1,) which of `masks` are an image's.
    """

    kind: str
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
            "auto", which looks at the files.
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
        kind = self.kind if self.kind != "auto" else _kind_of(list(owned.values()))
        if kind != "objects" and (several := [i for i, own in owned.items() if len(own) > 1]):
            raise ValueError(
                f"kind={kind} wants one mask file an image, {several[0]} has {len(owned[several[0]])}"
            )
        roots = files_below(self.images, SUFFIXES)[0]
        return Pairs(
            kind,
            Names(owned),
            Names(path for own in owned.values() for path in own),
            Names(unique_keys(roots, list(owned))),
            np.cumsum([0, *map(len, owned.values())]),
        )

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
            read_file=path.read_bytes,
        )

    def _annotations(self, path: Path, size: tuple[int, int]) -> tuple[Annotation, ...]:
        if self.pairs.kind != "objects":
            labels = read_labels(path, size, colour=self.pairs.kind == "colour")
            background = self.background if self.pairs.kind == "index" else (0,)
            return annotations_of(labels, background=background, components=self.components)
        image = read_mask_file(path)
        check_size(path, image, size)
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
            mask = (white > 0) & (not several)
        return annotations_of(mask.astype(np.uint8), components=self.components)


def whiteness(image: Image.Image) -> np.ndarray:
    """How white each pixel of a mask is, (H, W) in [0, 1]; 1 is full white whatever the depth."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        channels = np.asarray(image.convert("RGBA")).astype(np.float32)
        grey, alpha = channels[..., :3].max(axis=2), channels[..., 3]
        return (alpha if np.ptp(grey) == 0 else grey * alpha / 255) / 255
    if image.mode == "P":
        return (np.asarray(image) > 0).astype(np.float32)
    values = np.asarray(image).astype(np.float32)
    values = values if values.ndim == 2 else values.max(axis=2)
    highest = values.max(initial=0)
    return values / (1 if highest <= 1 else 255 if highest <= 255 else 65535)


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


def _kind_of(owned: Sequence[Sequence[str]]) -> str:
    """Which kind of masks these are, said in the log."""
    if most := max(len(own) for own in owned) - 1:
        kind, reason = "objects", f"an image has up to {most + 1} mask files"
    else:
        step = max(1, len(owned) // LOOKED_AT)
        kind, reason = _kind_of_files([own[0] for own in owned[::step]][:LOOKED_AT])
    meaning = {
        "index": "pixel value = object",
        "colour": "colour = object",
        "objects": "each file one object",
    }[kind]
    log.info("masks are read as kind=%s (%s): %s", kind, meaning, reason)
    return kind


def _kind_of_files(paths: Sequence[str]) -> tuple[str, str]:
    """The kind of masks of one file an image, and why."""
    values: set[int] = set()
    near_white = num_filled = 0
    for path in paths:
        try:
            image = read_mask_file(Path(path))
        except ValueError:
            continue  # counted when it is its turn
        if image.mode == "P":
            return "index", f"{Path(path).name} has a palette"
        grey = (np.rint(whiteness(image) * 255)).astype(np.int64)
        if image.mode in ("RGB", "RGBA"):
            channels = np.asarray(image.convert("RGB"))
            if (channels != channels[..., :1]).any():
                return "colour", f"{Path(path).name} is in colour"
        elif image.mode != "LA":
            values |= set(np.unique(np.asarray(image)).tolist())
        near_white += int((grey > 0.9 * 255).sum())
        num_filled += int((grey > 0).sum())
        values |= (
            set() if image.mode not in ("RGB", "RGBA", "LA") else set(np.unique(grey).tolist())
        )
    if len(values - {0}) <= 1:
        return (
            "objects",
            f"in {len(paths)} files looked at there are no values but {sorted(values)}",
        )
    if max(values) > 127 and near_white >= SOFT * num_filled:
        return "objects", f"in {len(paths)} files looked at most of what is not black is white"
    return "index", f"{len(paths)} files looked at hold {len(values)} values up to {max(values)}"
