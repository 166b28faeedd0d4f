"""What is large and stands out counts as prominent."""

from __future__ import annotations

import numpy as np

from data_engine.prominence import contrast_levels, image_prominence, prominence


def scene(side: int, level: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A square of a grey level on black, and its mask."""
    mask = np.zeros((size, size), bool)
    mask[20 : 20 + side, 30 : 30 + side] = True
    return mask, np.repeat(np.where(mask, level, 0)[..., None], 3, axis=2).astype(np.uint8)


def test_contrast_is_the_difference_to_what_is_round_a_thing() -> None:
    mask, pixels = scene(40, 90)

    assert contrast_levels(mask, pixels) == 90
    assert contrast_levels(np.ones_like(mask), pixels) == 0  # nothing is round it
    assert contrast_levels(np.zeros_like(mask), pixels) == 0


def test_the_larger_and_the_brighter_thing_is_more_prominent() -> None:
    assert prominence(*scene(40, 90)) > prominence(*scene(20, 90))
    assert prominence(*scene(40, 90)) > prominence(*scene(40, 30))


def test_an_image_with_a_larger_or_brighter_thing_is_more_prominent_at_any_size() -> None:
    large = image_prominence(scene(60, 200)[1])

    assert large > image_prominence(scene(20, 200)[1]) > image_prominence(scene(20, 60)[1])
    twice = np.kron(scene(60, 200)[1], np.ones((2, 2, 1), np.uint8))
    assert abs(image_prominence(twice) / large - 1) < 0.1


def test_an_empty_image_has_nothing_prominent() -> None:
    assert image_prominence(np.full((64, 100, 3), 128, np.uint8)) == 0
