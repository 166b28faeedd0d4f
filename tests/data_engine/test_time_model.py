"""Simulated time follows from the model alone."""

from __future__ import annotations

import pytest

from data_engine.time_model import SimulatedClock, TimeModel


def test_a_simulated_clock_stands_still_but_for_what_is_spent() -> None:
    clock = SimulatedClock()
    clock.spend(1.5)
    clock.spend(2)

    assert clock() == 3.5


def test_painting_takes_as_long_for_small_objects_which_are_enlarged() -> None:
    time = TimeModel(stroke_s=1, stroke_px_per_s=30, zoom_px=400, max_zoom=8)

    large = time.painting_s(600, object_px=200, screen_scale=1)
    small = time.painting_s(300, object_px=100, screen_scale=1)

    assert large == small == 1 + 1200 / 30
    assert time.painting_s(30, object_px=10, screen_scale=1) == 1 + 8 * 30 / 30  # no larger than 8x
    assert time.painting_s(900, object_px=900, screen_scale=1) == 31  # and never made smaller


def test_a_speed_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="stroke_px_per_s"):
        TimeModel(stroke_px_per_s=0)
