"""Ground truth of registered images, for simulated annotators and for measuring, and for nobody else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_engine.images import is_copy
from data_engine.records import Image, Rle
from sam_train.data.coco import CocoItems
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import decode_record
from sam_train.data.tar_samples import local_path, read_samples


class UnknownTruthError(ValueError):
    """An image of which no ground truth is at hand; the message says where it was looked for."""


def known_truth(image: Image) -> Sequence[Rle]:
    """The masks of an image, (H, W) of the image each, by the JSON beside it, as SA-1B has it.

    Raises:
        UnknownTruthError: there is no JSON in its shard or folder, or it is damaged.
        OSError: the shard is gone.
    """
    if image.member is None:
        return _beside(image)
    place = f"{image.member} of {image.path}"
    for sample in read_samples(image.path, is_wanted, image.offset or 0):
        if image.member not in {f"{sample.key}.{suffix}" for suffix in sample.files}:
            continue
        if "json" not in sample.files:
            raise UnknownTruthError(f"{place} has no JSON, so no ground truth")
        return _read(image, sample.files, place)
    raise UnknownTruthError(f"{place} is not there any more, so no ground truth is known")


def _beside(image: Image) -> Sequence[Rle]:
    path = local_path(image.path)
    beside = None if path is None else Path(path).with_suffix(".json")
    if beside is None or not beside.is_file():
        raise UnknownTruthError(
            f"{image.path} has no JSON of SA-1B beside it, so no ground truth is known: register shards "
            "(sam-convert makes them), or name a COCO file (truth=)"
        )
    # Of the image nothing is read.
    return _read(image, {"jpg": b"", "json": beside.read_bytes()}, image.path)


def _read(image: Image, files: Mapping[str, bytes], place: str) -> Sequence[Rle]:
    try:
        record = decode_record(image.key, files)
    except ValueError as error:
        raise UnknownTruthError(f"the ground truth of {place} is unusable: {error}") from None
    if record.size != image.size:
        raise UnknownTruthError(
            f"{place} is {image.size} pixels (height, width), its JSON says {record.size}"
        )
    return [annotation.rle for annotation in record.annotations]


@dataclass(frozen=True, kw_only=True)
class CocoTruth:
    """The same of images that were registered from a COCO file; called as `known_truth` is.

    Those that it does not know may have theirs beside them: they lie in shards, or were copied.

    Attributes:
        images: the folder that `file_name` is looked for in, as for `init`.
        annotations: the JSON file.
    """

    images: str
    annotations: str

    def __call__(self, image: Image) -> Sequence[Rle]:
        """The masks of an image.

        Raises:
            UnknownTruthError: the file has no usable annotation of it.
            FileNotFoundError, ValueError: it is no COCO file.
        """
        # The COCO file may have gone with the images that were copied.
        lies_apart = image.member is not None or is_copy(image)
        number = None if lies_apart else self._numbers.get(image.path)
        if number is None:
            try:
                return known_truth(image)
            except UnknownTruthError as error:
                if lies_apart:
                    raise
                raise UnknownTruthError(
                    f"{self.annotations} has no annotation of {image.path}"
                ) from error
        return [annotation.rle for annotation in self._items.record(number).annotations]

    @cached_property
    def _items(self) -> CocoItems:
        return CocoItems(images=self.images, annotations=self.annotations)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Places in the file of the images, by the paths that they are registered at."""
        items, found = self._items, {}
        for number in range(len(items)):
            entry = items.index.image(number)
            name = str(entry["file_name"])
            try:
                path = items.folder.at(name) or items.folder.by_bare_name(
                    name, namesake=items.index.namesake(number), size=None
                )
            except ValueError:  # not there, so not registered either
                continue
            found[os.path.abspath(path)] = number
        return found


@dataclass(frozen=True, kw_only=True)
class Truths:
    """Several of these: of an image the first that knows it.

    Attributes:
        of: called as `known_truth` is.
    """

    of: Sequence[Callable[[Image], Sequence[Rle]]]

    def __call__(self, image: Image) -> Sequence[Rle]:
        """The masks of an image.

        Raises:
            UnknownTruthError: none knows it.
        """
        said = []
        for known in self.of:
            try:
                return known(image)
            except UnknownTruthError as error:
                said.append(str(error))
        raise UnknownTruthError("; ".join(dict.fromkeys(said)))
