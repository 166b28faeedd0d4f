"""Finds the images of a folder, a glob, SA-1B shards or a COCO file, to be registered."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sam_train.data.coco_images import ImageFolder
from sam_train.data.file_lists import files_below
from sam_train.data.image_files import SUFFIXES
from sam_train.data.json_lists import elements
from sam_train.data.sa1b import ShardSource, is_wanted
from sam_train.data.shards import IMAGE_SUFFIXES
from sam_train.data.tar_samples import local_path, read_samples
from sam_train.data.urls import is_of_fsspec, listed, open_url


class Found(NamedTuple):
    """A file that should be an image.

    Attributes:
        name: for messages; its last part makes the image's key.
        path: it, or the shard that it lies in, absolute or a URL.
        read: gives its bytes; raises OSError or ValueError where it cannot.
        member, offset: its name in the shard, and where its sample begins there.
    """

    name: str
    path: str
    read: Callable[[], bytes]
    member: str | None = None
    offset: int | None = None


def find_images(images: str | Sequence[str], annotations: str | None = None) -> Iterator[Found]:
    """The images at a place, in a fixed order.

    Args:
        images: a folder of images (at any depth) or of shards, a glob of either, shards as `ShardSource`
            takes them, or a list of such; folders and globs also as URLs that fsspec knows.
        annotations: a COCO JSON file, whose images are then looked for in the folder `images`. Of it
            nothing but their names is read.

    Raises:
        FileNotFoundError, ValueError: there is nothing of the kind; the message says what was expected.
    """
    if annotations is not None:
        if not isinstance(images, str):
            raise ValueError("the images of a COCO file lie in one folder, got a list")
        return _of_coco(images, annotations)
    places = [images] if isinstance(images, str) else list(images)
    return (
        one for place in places for one in (_of_shards if _is_shards(place) else _of_files)(place)
    )


def _is_shards(place: str) -> bool:
    path = local_path(place)
    if is_of_fsspec(place):
        return not any(_is_image(name) for name in listed(place))
    if path is None or place.endswith((".tar", ".tar.gz", ".tgz")) or "::" in place:
        return True
    if not os.path.isdir(path):
        return False
    suffixes = {os.path.splitext(name)[1].lower() for name in os.listdir(path)}
    if ".tar" in suffixes and suffixes & SUFFIXES:
        raise ValueError(f"{place} holds shards and images: say which, as {place}/*.tar or *.jpg")
    return ".tar" in suffixes


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _of_files(place: str) -> Iterator[Found]:
    if is_of_fsspec(place):
        for url in filter(_is_image, listed(place)):
            yield Found(url, url, partial(read_url, url))
        return
    root, names = files_below(place, SUFFIXES)
    if not names:
        raise FileNotFoundError(
            f"{place} holds no image ({', '.join(sorted(SUFFIXES))}) and no shard (.tar)"
        )
    for name in names:
        path = os.path.abspath(os.path.join(root, name))
        yield Found(os.path.join(root, name), path, Path(path).read_bytes)


def _of_shards(place: str) -> Iterator[Found]:
    for shard in ShardSource(path=place).shards():
        path = local_path(shard)
        yield from _of_shard(shard if path is None else os.path.abspath(path))


def _of_shard(shard: str) -> Iterator[Found]:
    start = 0
    try:
        for sample in read_samples(shard, is_wanted):
            suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample.files), None)
            name = f"{shard}:{sample.key}"
            if suffix is None:
                error = ValueError(f"it has no image (.jpg or .png), only {sorted(sample.files)}")
                yield Found(name, shard, partial(_fail, error))
            else:
                read = partial(_itself, sample.files[suffix])
                yield Found(name, shard, read, f"{sample.key}.{suffix}", start)
            start = sample.end
    except (OSError, ValueError) as error:
        yield Found(shard, shard, partial(_fail, error))


def _of_coco(folder: str, annotations: str) -> Iterator[Found]:
    path = Path(annotations)
    if not path.is_file():
        raise FileNotFoundError(f"{annotations}: there is no such COCO JSON")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: there is no such folder of images")
    try:
        data = path.read_bytes()
        # Parsed again: `elements` does not decode text outside ASCII.
        entries = [
            json.loads(data[one.start : one.start + one.length])
            for one in elements(data, ("images",))
        ]
        entries = [entry for entry in entries if isinstance(entry, dict) and "file_name" in entry]
    except ValueError as error:
        raise ValueError(f"{annotations} is no COCO file: {error}") from None
    if not entries:
        raise ValueError(f"{annotations} lists no images with a file_name: no COCO file")
    namesakes: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        entry["file_name"] = str(entry["file_name"])
        namesakes[PurePosixPath(entry["file_name"]).name].add(entry["file_name"])
    looked_in = ImageFolder(folder)
    for entry in entries:
        others = namesakes[PurePosixPath(entry["file_name"]).name] - {entry["file_name"]}
        yield _coco_image(looked_in, entry, min(others, default=None))


def _coco_image(folder: ImageFolder, entry: dict[str, Any], namesake: str | None) -> Found:
    name = entry["file_name"]
    try:
        path = folder.at(name) or folder.by_bare_name(name, namesake=namesake, size=_size(entry))
    except ValueError as error:
        return Found(name, name, partial(_fail, error))
    return Found(name, os.path.abspath(path), path.read_bytes)


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    size = entry.get("height"), entry.get("width")
    return (size[0], size[1]) if all(type(side) is int for side in size) else None  # type: ignore[return-value]


def read_url(url: str) -> bytes:
    """All of a file that lies elsewhere."""
    with open_url(url) as stream:
        return stream.read()


def _itself(data: bytes) -> bytes:
    return data


def _fail(error: Exception) -> bytes:
    raise error
