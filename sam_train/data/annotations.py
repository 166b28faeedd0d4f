"""The annotations of a sample's JSON: checked all at once, and made only where one is looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import index, itemgetter
from typing import Any, NamedTuple, overload

import numpy as np

from sam_train.ops import rle
from sam_train.ops.rle import Rle
from sam_train.structures import Annotation

FIELDS = frozenset(
    "id segmentation bbox area predicted_iou stability_score point_coords crop_box".split()
)
FOUND_TOGETHER = itemgetter("id", "segmentation", "bbox", "area")
MEASURED = ("predicted_iou", "stability_score")


class Measures(NamedTuple):
    """What is asked of all masks of an image before some of them are drawn.

    Attributes:
        areas: (M,).
        boxes: (M, 4) xywh.
    """

    areas: np.ndarray
    boxes: np.ndarray


class EntryAnnotations(Sequence[Annotation]):
    """Annotations that `decode_annotation` makes of a JSON's entries, each when it is looked at.

    Attributes:
        entries: M of them, known to be sound.
        size: (H, W) of the image.
        measures: areas and boxes of all.
    """

    def __init__(self, entries: list[Any], size: tuple[int, int], measures: Measures) -> None:
        self.entries, self.size, self.measures = entries, size, measures

    @overload
    def __getitem__(self, place: int) -> Annotation: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Annotation, ...]: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return tuple(self[nth] for nth in range(*place.indices(len(self))))
        return decode_annotation(index(place), self.entries[place], self.size)

    def __iter__(self) -> Iterator[Annotation]:
        return (self[nth] for nth in range(len(self)))

    def __len__(self) -> int:
        return len(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple | EntryAnnotations) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        raise TypeError("annotations hold dicts, which have no hash")


def measures(annotations: Sequence[Annotation]) -> Measures:
    """The areas and boxes of an image's masks, of at least one."""
    if isinstance(annotations, EntryAnnotations):
        return annotations.measures
    return Measures(
        np.array([annotation.area for annotation in annotations]),
        np.array([annotation.bbox for annotation in annotations]),
    )


def rles(annotations: Sequence[Annotation], which: Sequence[int]) -> list[Rle]:
    """The run lengths of some of an image's masks."""
    if isinstance(annotations, EntryAnnotations):
        return [annotations.entries[nth]["segmentation"] for nth in which]
    return [annotations[nth].rle for nth in which]


def decode_annotations(entries: list[Any], size: tuple[int, int]) -> Sequence[Annotation]:
    """The entries of a sample's JSON as annotations; their run lengths are not decoded.

    Args:
        entries: as they were parsed.
        size: (H, W) of the image.

    Raises:
        ValueError: says what is wrong with the first that is unusable.
    """
    if (found := _measures_if_sound(entries, size)) is not None:
        return EntryAnnotations(entries, size, found)
    return tuple(decode_annotation(nth, entry, size) for nth, entry in enumerate(entries))


def _measures_if_sound(entries: list[Any], size: tuple[int, int]) -> Measures | None:
    """Areas and boxes of entries that all hold what they mostly hold; None asks for a look at each.

    No entry passes that `decode_annotation` refuses.
    """
    try:
        ids, masks, bboxes, areas = zip(*map(FOUND_TOGETHER, entries), strict=True)
        sizes = [mask["size"] for mask in masks if "counts" in mask]
        if (
            len(set(map(tuple, entries))) > 1  # their keys
            or sizes != [list(size)] * len(masks)
            or not {int}.issuperset(map(type, chain(ids, *sizes)))
        ):
            return None
        found = Measures(_finite(areas), _finite(bboxes))
        if found.areas.ndim != 1 or found.boxes.shape[1:] != (4,):
            return None
        x, y, width, height = found.boxes.T
        if (
            min(found.areas.min(), found.boxes.min()) < 0
            or (x + width).max() > size[1] + 1
            or (y + height).max() > size[0] + 1
            or not _others_are_sound(entries)
        ):
            return None
    except (TypeError, ValueError, LookupError, OverflowError):
        return None
    return found


def _others_are_sound(entries: list[dict[str, Any]]) -> bool:
    """Whether what not all writers write is as it mostly is, if any entry of the same keys has it."""
    names = entries[0].keys()
    return (
        all(_finite([own[name] for own in entries]).ndim == 1 for name in MEASURED if name in names)
        and (
            "crop_box" not in names
            or _finite(_once([own["crop_box"] for own in entries])).shape[1:] == (4,)
        )
        and (
            "point_coords" not in names
            or _finite([own["point_coords"] for own in entries]).shape[1:] == (1, 2)
        )
    )


def _once(values: list[Any]) -> list[Any]:
    """One of them where all are equal, as the crop boxes of masks found in the whole image."""
    return values[:1] if values.count(values[0]) == len(values) else values


def _finite(values: Sequence[Any]) -> np.ndarray:
    """Numbers, nested evenly, as an array of float64.

    Raises:
        ValueError: they are none, not all finite or of lengths that differ.
    """
    numbers = np.array(values)
    if numbers.dtype == np.int64:
        return numbers.astype(np.float64)
    if numbers.dtype != np.float64 or not np.isfinite(numbers).all():
        raise ValueError
    return numbers


def decode_annotation(index: int, entry: Any, size: tuple[int, int]) -> Annotation:
    """An entry of a sample's JSON; its run lengths are not decoded.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        if not isinstance(entry, dict) or "segmentation" not in entry:
            raise ValueError("it has no `segmentation`")
        segmentation, crop_box = entry["segmentation"], entry.get("crop_box")
        predicted, stability = entry.get("predicted_iou"), entry.get("stability_score")
        points = entry.get("point_coords")
        stated = rle.size_of(segmentation)
        if stated != size:
            raise ValueError(
                f"its RLE is {stated[0]} x {stated[1]} (height x width), "
                f"the image {size[0]} x {size[1]}"
            )
        return Annotation(
            id=int(entry.get("id", index)),
            rle=segmentation,
            bbox=_box(entry["bbox"], size) if "bbox" in entry else rle.bbox(segmentation),
            area=_area(entry["area"]) if "area" in entry else rle.area(segmentation),
            predicted_iou=None if predicted is None else _number(predicted),
            stability_score=None if stability is None else _number(stability),
            point_coords=None if points is None else _points(points),
            crop_box=None if crop_box is None else _numbers(crop_box, 4),
            extra=_others(entry),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"annotation {index} is unusable: {error}") from None


def _others(entry: dict[str, Any]) -> dict[str, Any]:
    if FIELDS.issuperset(entry):
        return {}
    return {name: value for name, value in entry.items() if name not in FIELDS}


def _box(values: Any, size: tuple[int, int]) -> tuple[Any, ...]:
    x, y, width, height = box = _numbers(values, 4)
    # A pixel of grace: some writers count edges, others pixels.
    if (
        x < 0
        or y < 0
        or width < 0
        or height < 0
        or x + width > size[1] + 1
        or y + height > size[0] + 1
    ):
        raise ValueError(f"its bbox {values} lies outside the image of {size[0]} x {size[1]}")
    return box


def _area(value: Any) -> float:
    area = _number(value)
    if area < 0:
        raise ValueError(f"its area is {value}")
    return area


def _numbers(values: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple) or len(values) != count:
        raise ValueError(f"expected {count} numbers, got {values!r}")
    numbers = tuple(map(float, values))
    if not math.isfinite(sum(numbers)):  # asked of all at once, then of each
        numbers = tuple(map(_number, numbers))
    return numbers


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value!r}")
    return number


def _points(values: Any) -> tuple[tuple[float, float], ...]:
    return tuple(_numbers(point, 2) for point in values)
