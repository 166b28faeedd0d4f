"""COCO JSON with an image folder: instances as polygons or run lengths, and panoptic PNGs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam_train.data.coco_images import ImageFolder
from sam_train.data.coco_index import CocoIndex, build_index, usable_polygons
from sam_train.data.file_lists import make_texts
from sam_train.data.image_files import header_size, read_image, read_labels, read_reduced
from sam_train.data.label_images import annotations_of
from sam_train.ops import rle
from sam_train.structures import Annotation, ImageRecord

FARTHEST = 10
"""A polygon's corner this many image sides away is damage: drawing it would take the memory of a large one."""


@dataclass(frozen=True, kw_only=True)
class CocoItems:
    """The images of a COCO instances file, as `Items`; those without a usable annotation are left out.

    Polygons and uncompressed run lengths become compressed ones when an image is read. Boxes and areas
    are measured on these, whatever the file says.

    Attributes:
        images: the folder that `file_name` is looked for in (see `ImageFolder`).
        annotations: the JSON file, parsed when first asked for; only places in it are kept (see `CocoIndex`).
        include_crowds: whether `iscrowd` regions, each a mask of many objects, count as masks.
    """

    images: str
    annotations: str
    include_crowds: bool = False

    def __post_init__(self) -> None:
        make_texts(self, "images", "annotations")

    @cached_property
    def index(self) -> CocoIndex:
        """Where in the file each image and its annotations lie."""
        return _index(self.folder, self.annotations, include_crowds=self.include_crowds)

    @cached_property
    def folder(self) -> ImageFolder:
        """Where the images lie."""
        return ImageFolder(self.images)

    def __len__(self) -> int:
        return len(self.index)

    def describe(self, index: int) -> str:
        """See `Items`."""
        return self.index.key(index)

    def record(self, index: int) -> ImageRecord:
        """See `Items`."""
        key, image, entries = self.index.read(index)
        path, size = _find_image(self.folder, self.index, index, image)
        return ImageRecord(
            key=key,
            size=size,
            annotations=_annotations(entries, size, self.index.categories),
            load=partial(read_image, path, size),
            load_reduced=partial(read_reduced, path, size),
            read_file=path.read_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class PanopticItems:
    """The images of a COCO panoptic file, as `Items`: things and stuff, a PNG of segment numbers an image.

    Attributes:
        images: the folder that the images' `file_name` is looked for in.
        masks: likewise for the PNGs.
        annotations: the JSON file.
        include_crowds: as in `CocoItems`.
    """

    images: str
    masks: str
    annotations: str
    include_crowds: bool = False

    def __post_init__(self) -> None:
        make_texts(self, "images", "masks", "annotations")

    @cached_property
    def index(self) -> CocoIndex:
        """Where in the file each image and its entry lie."""
        _check_folder(self.masks, "masks")
        return _index(self.folder, self.annotations, include_crowds=True, panoptic=True)

    @cached_property
    def folder(self) -> ImageFolder:
        """Where the images lie."""
        return ImageFolder(self.images)

    def __len__(self) -> int:
        return len(self.index)

    def describe(self, index: int) -> str:
        """See `Items`."""
        return self.index.key(index)

    def record(self, index: int) -> ImageRecord:
        """See `Items`."""
        key, image, entries = self.index.read(index)
        path, size = _find_image(self.folder, self.index, index, image)
        labels = read_labels(Path(self.masks) / str(entries[0]["file_name"]), size, colour=True)
        segments = {int(segment["id"]): segment for segment in entries[0]["segments_info"]}
        wanted = {
            number: _extra(segment, self.index.categories)
            for number, segment in segments.items()
            if self.include_crowds or not segment.get("iscrowd")
        }
        unknown = set(np.unique(labels).tolist()) - segments.keys() - {0}
        if unknown:
            raise ValueError(f"its PNG holds segments that its JSON lacks: {sorted(unknown)[:5]}")
        return ImageRecord(
            key=key,
            size=size,
            annotations=annotations_of(
                labels, background={0, *(segments.keys() - wanted.keys())}, extra=wanted
            ),
            load=partial(read_image, path, size),
            load_reduced=partial(read_reduced, path, size),
            read_file=path.read_bytes,
        )


def _check_folder(path: str, what: str) -> None:
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: there is no such folder of {what} (data.{what}=DIR)")


def _index(folder: ImageFolder, annotations: str, **settings: bool) -> CocoIndex:
    _check_folder(folder.path, "images")
    index = build_index(annotations, **settings)
    name = index.image(0).get("file_name")
    with suppress(ValueError):  # a name that is damage of one image, and said when that is read
        if isinstance(name, str) and folder.at(name) is None:
            folder.files  # noqa: B018  here once, and not by every reader
    return index


def _find_image(
    folder: ImageFolder, coco: CocoIndex, index: int, image: Mapping[str, Any]
) -> tuple[Path, tuple[int, int]]:
    """An image's file, and its (H, W) by the JSON, else by the file."""
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError("its JSON has no `file_name`")
    size = _stated_size(image)
    path = folder.at(name)
    if path is None:
        path = folder.by_bare_name(name, namesake=coco.namesake(index), size=size)
    return path, size or header_size(path)


def _stated_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    size = image.get("height"), image.get("width")
    if size == (None, None):
        return None
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"its JSON gives it no size: height {size[0]!r}, width {size[1]!r}")
    return size  # type: ignore[return-value]


def _annotations(
    entries: Sequence[Mapping[str, Any]], size: tuple[int, int], categories: Mapping[Any, str]
) -> tuple[Annotation, ...]:
    masks = []
    for entry in entries:
        try:
            masks.append(_run_lengths(entry["segmentation"], size))
        except (TypeError, ValueError) as error:
            raise ValueError(f"annotation {entry.get('id')} is unusable: {error}") from None
    encoded = [dict(mask, counts=mask["counts"].encode("ascii")) for mask in masks]
    boxes = coco_mask.toBbox(encoded) if encoded else []
    areas = coco_mask.area(encoded) if encoded else []
    return tuple(
        Annotation(
            id=entry["id"] if type(entry.get("id")) is int else number,
            rle=mask,
            bbox=tuple(box.tolist()),
            area=float(area),
            extra=_extra(entry, categories),
        )
        for number, (entry, mask, box, area) in enumerate(
            zip(entries, masks, boxes, areas, strict=True)
        )
    )


def _run_lengths(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Polygons or an RLE of either kind, checked, as a compressed RLE."""
    if isinstance(segmentation, list):
        polygons = usable_polygons(segmentation)
        limit = FARTHEST * max(size)
        # Written so that a NaN is caught too.
        if not all(abs(number) <= limit for polygon in polygons for number in polygon):
            raise ValueError(f"its polygon leaves the image of {size[0]} x {size[1]} by far")
        merged = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
        return {"size": list(size), "counts": merged["counts"].decode("ascii")}
    stated = rle.size_of(segmentation)
    if stated != size:
        raise ValueError(
            f"its RLE is {stated[0]} x {stated[1]} (height x width), the image {size[0]} x {size[1]}"
        )
    return rle.compress(segmentation)


def _extra(entry: Mapping[str, Any], categories: Mapping[Any, str]) -> dict[str, Any]:
    """What SA-1B's JSON has no place for and a user may want back: what the thing is, whether a crowd."""
    extra = {name: entry[name] for name in ("category_id",) if name in entry}
    if (category := categories.get(entry.get("category_id"))) is not None:
        extra["category"] = category
    return extra | ({"iscrowd": 1} if entry.get("iscrowd") else {})
