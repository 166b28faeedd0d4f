"""Small holes and islands: gone as segment_anything removes them, seen from a window only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.utils.amg import remove_small_regions

from sam_train.ops import run_edges
from sam_train.ops.small_regions import mend

SIZE = (90, 120)


def blobs(seed: int) -> np.ndarray:
    """Holes and islands of all sizes, in a part of the image that may reach its border."""
    draw = np.random.default_rng(seed)
    mask = np.zeros(SIZE, bool)
    for _ in range(25):
        y, x = draw.integers(0, SIZE[0]), draw.integers(0, SIZE[1] // 2)
        h, w = draw.integers(1, 16, 2)
        mask[y : y + h, x : x + w] = draw.random() < 0.6
    return mask


@pytest.mark.parametrize("min_area", [4, 30, 5000])
@pytest.mark.parametrize("seed", range(6))
def test_small_regions_go_as_published(seed: int, min_area: int) -> None:
    mask = blobs(seed)
    expected, has_holes = remove_small_regions(mask, min_area, "holes")
    expected, has_islands = remove_small_regions(expected, min_area, "islands")
    (edges,) = run_edges.run_edges(torch.from_numpy(mask)[None], top=0, left=0, height=SIZE[0])

    mended = mend(edges, SIZE, min_area)

    got = run_edges.window(mended.edges, (0, 0, SIZE[1], SIZE[0]), SIZE[0])
    np.testing.assert_array_equal(got, expected)
    assert mended.changed == (has_holes or has_islands)


def test_the_largest_part_is_measured() -> None:
    mask = np.zeros(SIZE, bool)
    mask[5:8, 5:9] = mask[20:22, 20:22] = True
    (edges,) = run_edges.run_edges(torch.from_numpy(mask)[None], top=0, left=0, height=SIZE[0])

    mended = mend(edges, SIZE, 100)

    assert mended.largest_part == run_edges.area(mended.edges) == 12
