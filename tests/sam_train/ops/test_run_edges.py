"""Masks as the borders of their runs: the same pixels, areas, boxes and overlaps as masks of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam_train.ops import rle, run_edges

SIZE = (13, 17)


def random_masks(count: int, size: tuple[int, int], density: float) -> torch.Tensor:
    masks = torch.rand(count, *size, generator=torch.Generator().manual_seed(0)) < density
    masks[0], masks[-1] = False, True
    return masks


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (2, 3), (0, 5), (4, 0)])
def test_a_window_is_encoded_as_the_whole_image_would_be(
    density: float, top: int, left: int
) -> None:
    masks = random_masks(6, (SIZE[0] - top, SIZE[1] - left), density)
    whole = torch.zeros(6, *SIZE, dtype=torch.bool)
    whole[:, top:, left:] = masks

    found = run_edges.run_edges(masks, top=top, left=left, height=SIZE[0])

    assert len(found) == 6
    for edges, mask in zip(found, whole.numpy(), strict=True):
        expected = rle.encode(mask)
        assert run_edges.to_rle(edges, SIZE) == expected
        assert run_edges.area(edges) == mask.sum()
        x, y, w, h = map(int, rle.bbox(expected))
        assert run_edges.box(edges, SIZE[0]) == (x, y, x + w, y + h)
        cut = run_edges.window(edges, (3, 1, 9, 11), SIZE[0])
        np.testing.assert_array_equal(cut, mask[1:11, 3:9])


def test_no_masks_have_no_edges() -> None:
    assert (
        run_edges.run_edges(torch.zeros(0, 4, 4, dtype=torch.bool), top=0, left=0, height=4) == []
    )


@pytest.mark.parametrize("density", [0.1, 0.6])
def test_overlap_and_union_are_those_of_the_pixels(density: float) -> None:
    masks = random_masks(7, SIZE, density)
    edges = run_edges.run_edges(masks, top=0, left=0, height=SIZE[0])

    for i in range(7):
        for j in range(7):
            common = int((masks[i] & masks[j]).sum())
            assert run_edges.intersection_area(edges[i], edges[j]) == common
    joined = run_edges.union(edges[:3])
    expected = rle.encode(masks[:3].any(0).numpy())
    assert run_edges.to_rle(joined, SIZE) == expected


@pytest.mark.parametrize("box", [(2, 3, 5, 9), (2, 0, 5, 13), (0, 0, 17, 13)])
def test_a_rectangle_has_its_pixels(box: tuple[int, int, int, int]) -> None:
    mask = np.zeros(SIZE, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True

    edges = run_edges.rectangle(box, SIZE[0])

    assert run_edges.to_rle(edges, SIZE) == rle.encode(mask)
