"""A simulated eye and hand are off by as much as they say, and as people are."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_engine.human_noise import Eye, Hand, iou, perimeter_px
from sam_train.data.sa1b import ShardSource
from sam_train.ops import rle


def disc(radius: float, side: int = 128) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side / 2
    return x**2 + y**2 < radius**2


@pytest.mark.parametrize("name", ["nuclei", "coco_panoptic", "balloon"])
def test_two_hands_agree_on_real_objects_as_people_do(shared_data: Path, name: str) -> None:
    source = ShardSource(path=str(shared_data / name / "val-000000.tar"))
    records = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
    masks = [
        rle.decode(one.rle)
        for record in islice(records, 6)
        for one in islice(iter(record.annotations), 10)
        if one.area >= 100  # below, a boundary cannot move by less than a pixel
    ]
    generator, hand = np.random.default_rng(0), Hand()

    agreement = [iou(hand.outline(m, generator), hand.outline(m, generator)) for m in masks]

    assert len(masks) >= 5
    assert 0.85 <= np.mean(agreement) <= 0.91


@pytest.mark.parametrize("radius", [10, 50])
def test_large_and_small_objects_are_painted_alike_well(radius: int) -> None:
    generator, hand, mask = np.random.default_rng(0), Hand(), disc(radius)

    agreement = np.mean([iou(hand.outline(mask, generator), mask) for _ in range(40)])

    assert 0.86 < agreement < 0.94


def test_a_click_lands_near_its_aim_and_never_beside_what_it_is_meant_for() -> None:
    generator, region = np.random.default_rng(0), disc(6)
    hand = Hand(click_noise_px=4)

    clicks = [hand.click(64, 64, region, 1.0, generator) for _ in range(200)]

    assert all(region[int(y), int(x)] for x, y in clicks)
    assert 2 < np.std([x for x, _ in clicks]) < 4  # those that would have missed are centred


def test_a_box_is_off_by_a_share_of_its_side_and_has_an_area() -> None:
    generator, hand = np.random.default_rng(0), Hand(box_noise=0.05)
    small = np.zeros((40, 40), bool)
    small[0, 0] = True

    boxes = np.array([hand.box(disc(40), generator) for _ in range(300)])

    assert abs(boxes[:, 0].std() - 0.05 * 80) < 0.5
    for x0, y0, x1, y1 in (hand.box(small, generator) for _ in range(50)):
        assert 0 <= x0 < x1 <= 40 and 0 <= y0 < y1 <= 40


def test_an_eye_is_right_on_average_and_unsure_by_what_it_says() -> None:
    generator, half = np.random.default_rng(0), disc(40)
    half[:, 64:] = False

    seen = [Eye(iou_noise=0.03).judge(half, disc(40), generator) for _ in range(400)]

    assert abs(np.mean(seen) - iou(half, disc(40))) < 0.01
    assert abs(np.std(seen) - 0.03) < 0.005


def test_the_perimeter_of_a_disc_is_its_circumference() -> None:
    assert abs(perimeter_px(disc(50)) - 2 * np.pi * 50) < 0.06 * 2 * np.pi * 50


def test_an_object_of_one_pixel_is_painted_as_something() -> None:
    dot = np.zeros((9, 9), bool)
    dot[4, 4] = True

    assert Hand(boundary_noise=2.0).outline(dot, np.random.default_rng(0)).any()
