"""Images out of shards, one ahead of whoever works on them; their masks, if any, are not looked at."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from sam_train.data.image_files import header_size
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import IMAGE_SUFFIXES, decode_image
from sam_train.data.tar_samples import local_path, read_samples
from sam_train.data.urls import open_url

T = TypeVar("T")


class InputShardError(OSError):
    """A shard of images that is gone, breaks off or changes; the message says which it is and why."""


class ShardImage(NamedTuple):
    """An image of a shard.

    Attributes:
        key: its name in the shard.
        suffix: of its file.
        data: that file.
        pixels: (H, W, 3) uint8 RGB.
        info: the object `image` of its JSON, as it came; empty where there is none.
    """

    key: str
    suffix: str
    data: bytes
    pixels: np.ndarray
    info: dict[str, Any]


class DamagedImage(NamedTuple):
    """An image of a shard that cannot be read, and why."""

    key: str
    reason: str


class ShardSum(NamedTuple):
    """What tells a shard from another: its size and checksum."""

    bytes: int
    sha256: str


class _ImageInfo(msgspec.Struct):
    image: dict[str, Any]


_decoder = msgspec.json.Decoder(_ImageInfo)


def read_images(url: str) -> Iterator[ShardImage | DamagedImage]:
    """The images of a shard, in its order.

    Raises:
        InputShardError: it cannot be read to its end; the images before were given out.
    """
    known: set[str] = set()
    try:
        for key, files, _ in read_samples(url, is_wanted):
            try:
                if key in known:
                    raise ValueError("an image of this name came before in the shard")
                known.add(key)
                yield _image(key, files)
            except ValueError as error:
                yield DamagedImage(key, str(error))
    except OSError as error:
        raise InputShardError(f"{url}: {_reason(error)}") from None
    if not known:
        raise InputShardError(f"{url}: it holds no image")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is worked on."""
    end = object()
    with ThreadPoolExecutor(1, "reader") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def sum_up(url: str) -> ShardSum:
    """Reads all of a shard.

    Raises:
        InputShardError: it cannot be read.
    """
    path = local_path(url)
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with open_url(url) if path is None else open(path, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
                num_bytes += len(block)
    except OSError as error:
        raise InputShardError(f"{url}: {_reason(error)}") from None
    return ShardSum(num_bytes, digest.hexdigest())


def stamp(url: str) -> tuple[int, int] | None:
    """Size and time of change of a shard that is a file; None of others and of one that is gone."""
    path = local_path(url)
    try:
        found = None if path is None else Path(path).stat()
    except OSError:
        return None
    return None if found is None else (found.st_size, found.st_mtime_ns)


def _image(key: str, files: Mapping[str, bytes]) -> ShardImage:
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in files), None)
    if suffix is None:
        raise ValueError(f"it has no image (.jpg or .png), only {sorted(files)}")
    info = _info(files["json"]) if "json" in files else {}
    data = files[suffix]
    height, width = header_size(io.BytesIO(data))
    stated = info.get("height", height), info.get("width", width)
    if stated != (height, width):
        raise ValueError(
            f"its image is {height} x {width} pixels (height x width), its JSON says "
            f"{stated[0]} x {stated[1]}"
        )
    return ShardImage(key, suffix, data, decode_image(data, (height, width)), info)


def _info(data: bytes) -> dict[str, Any]:
    try:
        return _decoder.decode(data).image
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its JSON cannot be read: {error}") from None


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
