"""Crops and point grids: those of segment_anything, and for SA-1B as many as the paper has."""

from __future__ import annotations

import numpy as np
import pytest
from segment_anything.utils import amg

from sam_train.inference.crops import crops, point_grids


@pytest.mark.parametrize("size", [(1500, 2250), (97, 60), (3300, 4950)])
@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_crops_lie_where_the_published_ones_do(size: tuple[int, int], num_layers: int) -> None:
    boxes, layers = amg.generate_crop_boxes(size, num_layers, 512 / 1500)

    found = crops(size, num_layers, 512 / 1500)

    assert [list(crop.box) for crop in found] == boxes
    assert [crop.layer for crop in found] == layers


def test_sa_1b_asks_3072_points_in_21_passes() -> None:
    grids = point_grids(32, 2, 2)
    found = crops((1500, 2250), 2, 512 / 1500)

    assert [len(grid) for grid in grids] == [32**2, 16**2, 8**2]
    assert len(found) == 21
    assert sum(len(grids[crop.layer]) for crop in found) == 3072
    for grid, expected in zip(grids, amg.build_all_layer_point_grids(32, 2, 2), strict=True):
        np.testing.assert_array_equal(grid, expected)


def test_a_layer_without_a_point_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no point in crop layer 2"):
        point_grids(3, 2, 2)


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (4, 50), (7, 3)])
def test_the_crops_of_an_image_of_a_few_pixels_have_pixels(size: tuple[int, int]) -> None:
    for (x0, y0, x1, y1), _ in crops(size, 2, 512 / 1500):
        assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]
