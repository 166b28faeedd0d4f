"""Annotations checked all at once are those that are made, and refused, one by one."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest

from sam_train.data.annotations import (
    EntryAnnotations,
    decode_annotation,
    decode_annotations,
    measures,
    rles,
)

SIZE = (24, 32)
FULL = {
    "id": 7,
    "segmentation": {"size": [24, 32], "counts": "PQ1"},
    "bbox": [1.0, 2, 3.5, 4.0],
    "area": 9,
    "predicted_iou": 0.9,
    "stability_score": 1,
    "point_coords": [[3, 4.5]],
    "crop_box": [0.0, 0.0, 32.0, 24.0],
    "round": "other keys are kept",
}
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, -0.5, 3, 40, 10**30, 1.5, math.nan, math.inf, "5", "x", [], {}, [3], [1, 2],
    [24, 32], [24.0, 32], [True, 32], [32, 24], [[1, 2]], [[1, 2], [3, 4]], [[1, None]], [0, 0, 9, 9],
    [0, 0, 33, 25], [0, 0, 33.5, 9], [0, 0, 9, 25.5], [0, -1, 9, 9], [0, 0, "9", 9], [0, 0, None, 9],
    [0, 0, 9, math.nan], [0, 0, 9], [[0, 0, 9, 9]], {"size": [24, 32]}, {"counts": "0"}, "text",
)  # fmt: skip


def entries(count: int, names: set[str] | None = None) -> list[Any]:
    kept = {name: value for name, value in FULL.items() if names is None or name in names}
    return [copy.deepcopy(kept) | {"id": nth} for nth in range(count)]


def one_by_one(of: list[Any]) -> Any:
    try:
        return tuple(decode_annotation(nth, entry, SIZE) for nth, entry in enumerate(of))
    except ValueError as error:
        return str(error)


def all_at_once(of: list[Any]) -> Any:
    try:
        return tuple(decode_annotations(of, SIZE))
    except ValueError as error:
        return str(error)


def same(a: Any, b: Any) -> bool:
    """By their texts, in which 1 is not 1.0, and nan is nan."""
    return repr(a) == repr(b)


@pytest.mark.parametrize("names", [None, {"id", "segmentation", "bbox", "area"}])
def test_sound_entries_are_checked_together_and_made_when_looked_at(names):
    of = entries(3, names)

    annotations = decode_annotations(of, SIZE)

    assert isinstance(annotations, EntryAnnotations) and len(annotations) == 3
    assert annotations == one_by_one(of) and one_by_one(of) == annotations
    assert annotations[1:] == one_by_one(of)[1:] and annotations[-1].id == 2
    assert annotations[np.int64(1)].id == 1
    areas, boxes = measures(annotations)
    assert areas.tolist() == [9.0] * 3 and boxes.tolist() == [[1.0, 2.0, 3.5, 4.0]] * 3
    assert rles(annotations, [2, 0]) == [one.rle for one in (annotations[2], annotations[0])]


@pytest.mark.parametrize("name", sorted(FULL))
@pytest.mark.parametrize("place", [0, 2])
def test_one_odd_value_among_sound_entries_is_taken_or_refused_as_by_itself(name, place):
    for value in VALUES:
        of = entries(3)
        of[place][name] = value
        assert same(all_at_once(of), one_by_one(of)), value


@pytest.mark.parametrize("name", sorted(FULL))
def test_an_odd_value_in_every_entry_is_taken_or_refused_as_by_itself(name):
    for value in VALUES:
        of = [entry | {name: value} for entry in entries(3)]
        assert same(all_at_once(of), one_by_one(of)), value


def test_run_lengths_odd_in_any_part_are_taken_or_refused_as_by_themselves():
    for part in ("size", "counts"):
        for value in (*VALUES, ...):
            of = entries(3)
            if value is ...:
                del of[1]["segmentation"][part]
            else:
                of[1]["segmentation"][part] = value
            assert same(all_at_once(of), one_by_one(of)), (part, value)


def test_entries_of_random_damage_are_taken_or_refused_as_one_by_one():
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        of = entries(rng.randint(0, 4))
        for _ in range(rng.randint(0, 2) if of else 0):
            nth = rng.randrange(len(of))
            if not isinstance(of[nth], dict) or rng.random() < 0.1:
                of[nth] = rng.choice(VALUES)
            elif rng.random() < 0.3:
                of[nth].pop(rng.choice(sorted(FULL)), None)
            else:
                of[nth][rng.choice(sorted(FULL))] = rng.choice(VALUES)
        expected = one_by_one(of)
        assert same(all_at_once(of), expected), of
        refused += isinstance(expected, str)
    assert 200 < refused < 1800


def test_annotations_made_one_by_one_give_the_same_measures(make):
    record = make.square("a")

    areas, boxes = measures(record.annotations)

    assert areas.tolist() == [record.annotations[0].area]
    assert boxes.tolist() == [list(record.annotations[0].bbox)]
    assert rles(record.annotations, [0]) == [record.annotations[0].rle]
