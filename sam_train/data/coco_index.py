"""A COCO file as places in it: what every reader process needs of it is a few megabytes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sam_train.data.json_lists import Element, elements
from sam_train.data.source import UnusableSourceError

log = logging.getLogger(__name__)

STEM, NAME, NAME_AND_ID = 0, 1, 2
"""What an image's key is: the least of these that is its own."""


@dataclass(frozen=True, kw_only=True)
class CocoIndex:
    """The images that have annotations, and where in the file both lie. 16 bytes an annotation, 42 an image.

    Attributes:
        path: the file, which is read again at these places for each image.
        stamp: its size and time of change when it was parsed.
        images: (N, 2) int64, start and length of each image's entry.
        annotations: (M, 2) likewise, image by image.
        bounds: (N + 1,) which of `annotations` are an image's.
        key_kinds: (N,) what each image's key is made of.
        namesakes: (N, 2) as `images`, of an image whose `file_name` is the same but for its folders; of
            length 0 where there is none.
        shared_ids: (N,) bool, whether another image of another file has the same id.
        categories: names by id.
        names: a digest of the images' names, which tells them from those of another file.
    """

    path: str
    stamp: tuple[int, int]
    images: np.ndarray
    annotations: np.ndarray
    bounds: np.ndarray
    key_kinds: np.ndarray
    namesakes: np.ndarray
    shared_ids: np.ndarray
    categories: Mapping[Any, str]
    names: str

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> dict[str, Any]:
        """An image's entry.

        Raises:
            UnusableSourceError: the file has changed.
        """
        return self._entries(self.images[index : index + 1])[0]

    def key(self, index: int) -> str:
        """An image's name, of its own within the file; raises as `image` does."""
        return self._key(index, self.image(index))

    def namesake(self, index: int) -> str | None:
        """The `file_name` of another image of the same bare name; raises as `image` does."""
        if not self.namesakes[index, 1]:
            return None
        return str(self._entries(self.namesakes[index : index + 1])[0]["file_name"])

    def read(self, index: int) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
        """An image's key, its entry and those of its annotations.

        Raises:
            UnusableSourceError: the file has changed.
            ValueError: another image has the same id.
        """
        start, end = self.bounds[index : index + 2]
        places = np.concatenate([self.images[index : index + 1], self.annotations[start:end]])
        image, *entries = self._entries(places)
        if self.shared_ids[index]:
            raise ValueError(
                f"its id {image.get('id')} is that of another image too, so nothing says whose "
                "the annotations are"
            )
        return self._key(index, image), image, entries

    def _entries(self, places: np.ndarray) -> list[dict[str, Any]]:
        stamp: tuple[int, int] | None = None
        texts: list[bytes] = []
        with suppress(FileNotFoundError), open(self.path, "rb") as file:
            texts = [os.pread(file.fileno(), length, start) for start, length in places.tolist()]
            stamp = _stamp(file.fileno())  # afterwards: it may change while it is read
        if stamp != self.stamp:
            change = "is gone" if stamp is None else "has changed"
            raise UnusableSourceError(
                f"{self.path} {change} since it was indexed at the start, so the places of its entries "
                "are no longer known. Put back the file as it was, or start the command again, which "
                "indexes it anew; write other annotations under another name"
            )
        return [json.loads(text) for text in texts]

    def _key(self, index: int, image: Mapping[str, Any]) -> str:
        return _names(image.get("file_name"), image.get("id"))[self.key_kinds[index]]


def build_index(path: str, *, include_crowds: bool, panoptic: bool = False) -> CocoIndex:
    """Parses a file once, and says in the log what of it is left out.

    Args:
        path: the JSON file.
        include_crowds: whether annotations that are marked `iscrowd` count.
        panoptic: whether annotations are panoptic ones, an entry an image.

    Raises:
        FileNotFoundError, ValueError: it is none; the message says what was expected.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such COCO JSON (data.annotations=FILE)")
    with open(path, "rb") as file:
        data, stamp = file.read(), _stamp(file.fileno())
    found = _Found(panoptic=panoptic, include_crowds=include_crowds)
    try:
        for element in elements(data, ("images", "annotations", "categories")):
            if not isinstance(element.value, dict):
                raise ValueError(f"an entry of `{element.name}` is no object but {element.value!r}")
            getattr(found, f"add_{element.name}")(element, data)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is no COCO file ({{'images': [...], 'annotations': [...]}}): {error}"
        ) from None
    if not found.images or not found.annotations:
        absent = "annotations" if found.images else "images"
        raise ValueError(
            f"{path} holds no usable {absent}; expected a COCO file of `images` and `annotations` "
            + ("with `segments_info`" if panoptic else "with a `segmentation` each")
            + (f"; left out: {dict(found.left_out)}" if found.left_out else "")
        )
    return found.index(path, stamp)


def usable_polygons(segmentation: Any) -> list[list[float]]:
    """The polygons of three points or more: others have no area, and pycocotools fails on them."""
    if not isinstance(segmentation, list):
        return []
    return [
        polygon
        for polygon in segmentation
        if isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
    ]


@dataclass
class _Found:
    """What was met in a file so far; ids as they came, since images may come after annotations."""

    panoptic: bool
    include_crowds: bool
    images: list[tuple[int, int]] = field(default_factory=list)
    image_ids: list[Any] = field(default_factory=list)
    file_names: list[Any] = field(default_factory=list)
    annotations: list[tuple[int, int]] = field(default_factory=list)
    owners: list[Any] = field(default_factory=list)
    places: dict[Any, tuple[int, int]] = field(default_factory=dict)
    categories: dict[Any, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add_categories(self, element: Element, data: bytes) -> None:
        entry = _utf8(element, data)
        if "id" in entry and isinstance(entry.get("name"), str):
            self.categories[entry["id"]] = entry["name"]

    def add_images(self, element: Element, data: bytes) -> None:
        image_id, name = element.value.get("id"), element.value.get("file_name")
        if "id" not in element.value:
            return self._leave_out("images without an id", f"file {name}")
        if not isinstance(image_id, Hashable):
            return self._leave_out("images whose id is a list or an object", f"{image_id}")
        if name and not PurePosixPath(str(name)).name:
            return self._leave_out("images whose file_name names no file", f"{name!r}")
        self.images.append((element.start, element.length))
        self.image_ids.append(image_id)
        self.file_names.append(name)

    def add_annotations(self, element: Element, data: bytes) -> None:
        entry = element.value
        name = f"annotation {entry.get('id')} of image {entry.get('image_id')}"
        if reason := self._unusable(entry):
            return self._leave_out(reason, name)
        place = element.start, element.length
        number = entry.get("id", element.start)
        # A list as a number tells no annotation from another: such a one is itself alone.
        number = number if isinstance(number, Hashable) else f"at byte {element.start}"
        before = self.places.setdefault(number, place)
        if before != place and _slice(data, before) == _slice(data, place):
            return self._leave_out("annotations that are there twice", name)
        self.annotations.append(place)
        self.owners.append(entry.get("image_id"))

    def _unusable(self, entry: Mapping[str, Any]) -> str:
        if not isinstance(entry.get("image_id"), Hashable):
            return "annotations whose image_id is a list or an object"
        if self.panoptic:
            is_one = isinstance(entry.get("segments_info"), list) and entry.get("file_name")
            return "" if is_one else "annotations without segments_info and file_name"
        segmentation = entry.get("segmentation")
        if not segmentation:
            return "annotations without a segmentation"
        if isinstance(segmentation, list) and not usable_polygons(segmentation):
            return "annotations whose polygons have fewer than three points"
        if entry.get("iscrowd") and not self.include_crowds:
            return "crowds (include_crowds=true takes them)"
        return ""

    def _leave_out(self, reason: str, example: str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, example)

    def index(self, path: str, stamp: tuple[int, int]) -> CocoIndex:
        """Sorts what was found by image; images without annotations are left out.

        Raises:
            ValueError: no annotation is of an image.
        """
        first: dict[Any, int] = {}
        shared: set[int] = set()
        for number, image_id in enumerate(self.image_ids):
            other = first.setdefault(image_id, number)
            if other == number:
                continue
            if self.file_names[other] == self.file_names[number]:
                self._leave_out("images that are there twice", str(self.file_names[number]))
            else:
                shared |= {other, number}
        owners = np.array([first.get(owner, -1) for owner in self.owners], np.int64)
        if (owners < 0).all():
            raise ValueError(f"{path}: {self._no_match()}")
        for number in np.flatnonzero(owners < 0)[:1].tolist():
            reason = "annotations of images that the file does not list"
            self._leave_out(reason, f"one of image {self.owners[number]}")
            self.left_out[reason] = int((owners < 0).sum())
        counts = np.bincount(owners[owners >= 0], minlength=len(self.images))
        kept = np.array(sorted({*np.flatnonzero(counts).tolist(), *shared}), np.int64)
        if bare := len(first) - len(set(kept.tolist()) & set(first.values())):
            self.left_out["images without a usable annotation"] = bare
        self._report(path)
        order = np.argsort(owners, kind="stable")[(owners < 0).sum() :]
        return CocoIndex(
            path=path,
            stamp=stamp,
            images=np.array(self.images, np.int64)[kept],
            annotations=np.array(self.annotations, np.int64)[order],
            bounds=np.concatenate([[0], np.cumsum(counts[kept])]),
            key_kinds=self._key_kinds(kept),
            namesakes=self._namesakes(kept),
            shared_ids=np.isin(kept, list(shared)),
            categories=self.categories,
            names=self._digest(kept),
        )

    def _no_match(self) -> str:
        owner, image_id = self.owners[0], self.image_ids[0]
        kinds = type(owner).__name__, type(image_id).__name__
        return (
            f"no annotation belongs to an image: the first `image_id` is {owner!r} ({kinds[0]}), the first "
            f"image's `id` {image_id!r} ({kinds[1]}); "
            + (
                "expected ids of one type"
                if kinds[0] != kinds[1]
                else "expected the ids of its images"
            )
        )

    def _digest(self, kept: np.ndarray) -> str:
        names = "\n".join(str(self.file_names[number]) for number in kept.tolist())
        return hashlib.blake2b(names.encode(errors="replace"), digest_size=16).hexdigest()

    def _key_kinds(self, kept: np.ndarray) -> np.ndarray:
        names = [_names(self.file_names[i], self.image_ids[i]) for i in kept.tolist()]
        stems, files = (Counter(name[kind] for name in names) for kind in (STEM, NAME))
        return np.array(
            [
                STEM if stems[stem] == 1 else NAME if files[name] == 1 else NAME_AND_ID
                for stem, name, _ in names
            ],
            np.int8,
        )

    def _namesakes(self, kept: np.ndarray) -> np.ndarray:
        numbers: dict[
            str, list[int]
        ] = {}  # of each bare name up to two images, of other full names
        for number, name in enumerate(self.file_names):
            of_name = numbers.setdefault(PurePosixPath(str(name)).name, [])
            if len(of_name) < 2 and all(name != self.file_names[other] for other in of_name):
                of_name.append(number)
        found = np.zeros((len(kept), 2), np.int64)
        for place, number in enumerate(kept.tolist()):
            name = self.file_names[number]
            for other in numbers[PurePosixPath(str(name)).name]:
                if self.file_names[other] != name:
                    found[place] = self.images[other]
        return found

    def _report(self, path: str) -> None:
        for reason, count in self.left_out.items():
            example = f" (the first: {self.examples[reason]})" if reason in self.examples else ""
            log.warning("%s: %d %s are left out%s", Path(path).name, count, reason, example)


def _names(file_name: Any, image_id: Any) -> tuple[str, str, str]:
    name = str(file_name)
    return str(PurePosixPath(name).with_suffix("")) if name else name, name, f"{name}#{image_id}"


def _slice(data: bytes, place: tuple[int, int]) -> bytes:
    return data[place[0] : place[0] + place[1]]


def _utf8(element: Element, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(_slice(data, (element.start, element.length)))
    return entry


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
