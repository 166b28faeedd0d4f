"""What the pixels of mask files mean, found out from some of them and held against the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from sam_train.data.image_files import read_mask_file

log = logging.getLogger(__name__)

KINDS = ("auto", "index", "colour", "objects")
MEANINGS = {
    "index": "pixel value = object",
    "colour": "colour = object",
    "objects": "each file one object",
}

LOOKED_AT = 24
"""Mask files that are looked at to find out their kind."""

SOFT = 0.8
"""A grey mask is a soft one, not one of object numbers, if so many of its pixels above 0 are near white."""


@dataclass(frozen=True)
class Kind:
    """What the masks of a data set are, the same for all of its files.

    Attributes:
        name: "index", "colour" or "objects".
        reason: why, if it was found out from the files; empty if the user said so.
        is_hard: whether each of the files looked at holds one value besides 0: another file with more of
            them may mean that they were too few to tell.
    """

    name: str
    reason: str = ""
    is_hard: bool = False

    def check(self, path: Path, image: Image.Image) -> None:
        """Holds a mask against what the files looked at said.

        Raises:
            ValueError: by itself it would be of another kind.
        """
        if not self.is_hard:
            return
        look = Look()
        look.add(path, image)
        own = look.kind()
        if own.is_hard or own.name == self.name:
            return
        raise ValueError(
            f"its mask {path} is not like those that the kind was found out from: all are read as "
            f"kind={self.name}, as {self.reason}, but by itself it is kind={own.name}, as {own.reason}. "
            "Say which all of them are: data.train.items.kind=index, colour or objects"
        )


@dataclass
class Look:
    """What was seen of mask files, one after the other, all of them one file an image."""

    num_files: int = 0
    palette: str = ""
    coloured: str = ""
    values: set[int] = field(default_factory=set)
    most_values: int = 0
    near_white: int = 0
    num_filled: int = 0

    def add(self, path: Path, image: Image.Image) -> None:
        """Looks at one more."""
        self.num_files += 1
        if image.mode == "P":
            self.palette = self.palette or path.name
            return
        if image.mode in ("RGB", "RGBA"):
            channels = np.asarray(image.convert("RGB"))
            if (channels != channels[..., :1]).any():
                self.coloured = self.coloured or path.name
                return
        grey = np.rint(whiteness(image) * 255).astype(np.uint8)
        counts = np.bincount(grey.ravel(), minlength=256)
        self.near_white += int(counts[230:].sum())  # above 90 %
        self.num_filled += int(counts[1:].sum())
        if image.mode in ("RGB", "RGBA", "LA"):
            own = np.flatnonzero(counts)
        else:
            own = _values(np.asarray(image))
        self.values |= set(own.tolist())
        self.most_values = max(self.most_values, int((own > 0).sum()))

    def kind(self) -> Kind:
        """The kind of all that was seen, and why."""
        seen = f"{self.num_files} file{'s' if self.num_files > 1 else ''} looked at"
        if self.palette:
            return Kind("index", f"{self.palette} has a palette")
        if self.coloured:
            return Kind("colour", f"{self.coloured} is in colour")
        above = self.values - {0}
        if len(above) <= 1:
            # Of 0 and 1 each file is the same mask either way, and others may number more objects.
            name = "index" if max(above, default=0) == 1 else "objects"
            return Kind(name, f"in {seen} there are no values but {sorted(self.values)}", True)
        if max(above) > 127 and self.near_white >= SOFT * self.num_filled:
            return Kind(
                "objects",
                f"in {seen} most of what is not black is white",
                self.most_values <= 1,
            )
        return Kind(
            "index",
            f"{seen} hold{'' if self.num_files > 1 else 's'} {len(self.values)} "
            f"values up to {max(above)}",
        )


def kind_of(owned: Sequence[Sequence[str]], where: str) -> Kind:
    """Which kind of masks these are, said in the log.

    The same for the same files: of many images some at even distances are looked at.

    Args:
        owned: the mask files of each image.
        where: the folder, for the log.
    """
    if most := max(len(own) for own in owned) - 1:
        kind = Kind("objects", f"an image has up to {most + 1} mask files")
    else:
        step = max(1, len(owned) // LOOKED_AT)
        look = Look()
        for own in owned[::step][:LOOKED_AT]:
            try:
                image = read_mask_file(Path(own[0]))
            except ValueError:
                continue  # counted when it is its turn
            look.add(Path(own[0]), image)
        kind = look.kind()
    log.info(
        "masks of %s are read as kind=%s (%s): %s",
        where,
        kind.name,
        MEANINGS[kind.name],
        kind.reason,
    )
    return kind


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


def _values(pixels: np.ndarray) -> np.ndarray:
    """The values that come, ascending."""
    if pixels.dtype in (np.uint8, np.bool_):
        return np.flatnonzero(np.bincount(pixels.ravel(), minlength=2))
    return np.unique(pixels).astype(np.int64)
