"""Sizes, concavity, coverage and overlaps of masks."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pytest

from data_engine import mask_shapes
from sam_train.ops import rle


def disc(radius: int, size: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] - size // 2
    return rows**2 + columns**2 <= radius**2


def rectangle(top: int, left: int, bottom: int, right: int, size: int = 32) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        rectangle(3, 4, 10, 20),
        rectangle(5, 5, 6, 6),
        rectangle(5, 5, 6, 25),
        np.eye(32, dtype=bool),
        disc(4),
        disc(25),
        rectangle(0, 0, 32, 32),
    ],
    ids=["rectangle", "pixel", "row", "diagonal", "small disc", "disc", "whole image"],
)
def test_a_convex_shape_has_no_concavity_however_it_is_drawn_with_pixels(mask: np.ndarray) -> None:
    assert mask_shapes.concavity(rle.encode(mask)) == 0


def test_a_notch_is_the_concavity() -> None:
    mask = rectangle(2, 2, 12, 12)
    mask[2:10, 4:9] = False  # a U: the notch is open at its top

    assert mask_shapes.concavity(rle.encode(mask)) == pytest.approx(40 / 100)


def test_islands_and_holes_count_as_what_lies_between_them() -> None:
    islands = rectangle(0, 0, 4, 4) | rectangle(0, 12, 4, 16)
    ring = rectangle(1, 1, 11, 11) & ~rectangle(3, 3, 9, 9)

    assert mask_shapes.concavity(rle.encode(islands)) == pytest.approx(1 - 32 / 64)
    assert mask_shapes.concavity(rle.encode(ring)) == pytest.approx(36 / 100)


def test_the_hull_holds_the_pixels_whose_centres_lie_in_it() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((24, 24), bool)
        rows, columns = generator.integers(3, 21, (2, 6))
        mask[rows, columns] = True
        hull = cv2.convexHull(np.argwhere(mask)[:, ::-1].astype(np.int32))
        inside = sum(
            cv2.pointPolygonTest(hull, (float(x), float(y)), False) >= 0
            for x in range(24)
            for y in range(24)
        )

        found = mask_shapes.concavity(rle.encode(mask))

        assert found == pytest.approx(1 - mask.sum() / inside)


def test_an_empty_mask_has_no_hull() -> None:
    with pytest.raises(ValueError, match="no hull"):
        mask_shapes.concavity(rle.encode(np.zeros((4, 4), bool)))


def test_coverage_counts_a_pixel_once() -> None:
    masks = [rectangle(0, 0, 16, 16), rectangle(8, 0, 24, 16), rectangle(0, 0, 4, 4)]

    assert mask_shapes.coverage([rle.encode(own) for own in masks], (32, 32)) == 24 * 16 / 32**2
    assert mask_shapes.coverage([], (32, 32)) == 0


def test_the_relative_size_of_a_square_is_its_side_beside_the_image_s() -> None:
    assert mask_shapes.relative_size(8 * 8, (32, 32)) == 0.25


@pytest.mark.parametrize("ones", [[], [rectangle(0, 0, 4, 8), rectangle(0, 0, 4, 4)]])
def test_ious_are_of_each_with_each(ones: Sequence[np.ndarray]) -> None:
    others = [rectangle(0, 0, 4, 4), rectangle(8, 8, 9, 9), rectangle(0, 2, 4, 6)]

    found = mask_shapes.ious(*([rle.encode(own) for own in masks] for masks in (ones, others)))

    expected = [[(a & b).sum() / (a | b).sum() for b in others] for a in ones]
    np.testing.assert_allclose(found, np.reshape(expected, (len(ones), 3)))
