"""Image files of a folder: sizes, pixels, and pixel values that name objects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from sam_train.data.shards import decode_image, decode_reduced, quiet_pillow

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
"""What counts as an image in a folder, in lower case."""


_PILLOW_LIMIT = threading.Lock()


class TooLargeError(ValueError):
    """An image of more pixels than the user has said to take."""


def read_large_image(path: Path, max_pixels: int) -> np.ndarray:
    """The (H, W, 3) uint8 RGB pixels of a user's own file, also where it is above Pillow's own limit.

    Args:
        path: the file.
        max_pixels: the most it may have. One of more is not decoded.

    Raises:
        TooLargeError: it has more.
        ValueError: it is no image, or damaged.
    """
    with _any_size():
        height, width = header_size(path)
        if height * width > max_pixels:
            raise TooLargeError(
                f"{path} is {width} x {height} = {width * height:,} pixels large, more than "
                f"max_pixels={max_pixels}: say max_pixels={width * height} to take it, at about 8 bytes of "
                "memory a pixel"
            )
        return read_image(path, (height, width))


@contextmanager
def _any_size() -> Iterator[None]:
    """Takes Pillow's limit on pixels away for a moment; it is a global, which others go on relying on."""
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The (H, W, 3) uint8 RGB pixels of a file, which must have this (H, W); see `decode_image`."""
    return decode_image(path.read_bytes(), size)


def read_reduced(path: Path, size: tuple[int, int], shrink: int) -> tuple[Image.Image, int]:
    """The same at 1/n of the size, and n, where the file is a JPEG; see `decode_reduced`."""
    return decode_reduced(path.read_bytes(), size, shrink)


def header_size(path: Path | IO[bytes]) -> tuple[int, int]:
    """The (H, W) of an image file, by path or opened, which is not decoded.

    Raises:
        ValueError: it is no image.
    """
    with quiet_pillow():
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"its image cannot be read: {error}") from None


def read_mask_file(path: Path) -> Image.Image:
    """A mask file, decoded.

    Raises:
        ValueError: it is no image, or damaged.
    """
    with quiet_pillow():
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"its mask {path} cannot be decoded: {error}") from None


def read_labels(path: Path, size: tuple[int, int], *, colour: bool) -> np.ndarray:
    """A file's pixel values as (H, W) integers.

    Args:
        path: the file.
        size: the (H, W) it must have.
        colour: whether a pixel's value is its colour, red + 256 green + 65536 blue (as in COCO's
            panoptic PNGs), and 0 where it is transparent; else it is its number: a palette's index, a
            grey value of up to 16 bits.

    Raises:
        ValueError: it cannot be decoded, or is of another size or kind.
    """
    image = read_mask_file(path)
    check_size(path, image, size)
    return labels_of(path, image, colour=colour)


def labels_of(path: Path, image: Image.Image, *, colour: bool) -> np.ndarray:
    """The pixel values of an image that was read from `path`; see `read_labels`."""
    if not colour:
        return index_values(path, image)
    channels = np.asarray(image.convert("RGBA")).astype(np.int64)
    labels: np.ndarray = channels[..., :3] @ np.array([1, 256, 65536])
    return np.where(channels[..., 3] == 0, 0, labels)


def index_values(path: Path, image: Image.Image) -> np.ndarray:
    """The number of each pixel, (H, W)."""
    values = np.asarray(image)
    if values.ndim == 3:
        grey = values[..., 0]
        if len(image.getbands()) > 2 and (values[..., :3] != grey[..., None]).any():
            raise ValueError(f"its mask {path} is in colour; for colour = object say kind=colour")
        values = grey
    if values.dtype.kind == "f":
        if not np.equal(values, np.rint(values)).all():
            raise ValueError(f"its mask {path} holds fractions, expected whole numbers")
        values = values.astype(np.int64)
    return values


def check_size(path: Path, image: Image.Image, size: tuple[int, int]) -> None:
    """Raises a ValueError where a mask has not the (H, W) of its image."""
    if (image.height, image.width) != tuple(size):
        raise ValueError(
            f"its mask {path} is {image.height} x {image.width} pixels (height x width), "
            f"the image {size[0]} x {size[1]}"
        )
