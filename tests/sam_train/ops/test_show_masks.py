"""Masks drawn as the published notebooks draw them."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
import torch

from sam_train.ops import rle
from sam_train.ops.show_masks import show_masks

IMAGE = np.full((60, 80, 3), 128, np.uint8)
LARGE = np.zeros((60, 80), bool)
LARGE[5:55, 5:75] = True
SMALL = np.zeros((60, 80), bool)
SMALL[20:30, 30:40] = True


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    matplotlib.use("agg")
    yield
    from matplotlib import pyplot as plt

    plt.close("all")


def layer(axes) -> np.ndarray:
    """The transparent picture over the image."""
    return np.asarray(axes.images[1].get_array())


def test_a_small_mask_is_seen_on_a_large_one_that_is_listed_after_it() -> None:
    (axes,) = show_masks(IMAGE, np.stack([SMALL, LARGE]), seed=0, borders=False)

    drawn = layer(axes)
    assert (drawn[25, 35] != drawn[10, 10]).any()
    assert drawn[25, 35, 3] > 0 and drawn[10, 10, 3] > 0 and drawn[0, 0, 3] == 0


def test_a_seed_fixes_the_colours() -> None:
    masks = np.stack([SMALL, LARGE])
    first, second, other = (layer(show_masks(IMAGE, masks, seed=s)[0]) for s in (1, 1, 2))
    assert (first == second).all() and (first != other).any()
    assert (layer(show_masks(IMAGE, masks)[0]) != layer(show_masks(IMAGE, masks)[0])).any()


def test_borders_are_drawn_unless_told_otherwise() -> None:
    with_border, without = (
        layer(show_masks(IMAGE, LARGE[None], seed=0, borders=b)[0]) for b in (True, False)
    )
    assert (with_border[30, 40] == without[30, 40]).all()
    assert (with_border[30, 5] != without[30, 5]).any()


@pytest.mark.parametrize(
    "masks",
    [
        np.stack([SMALL, LARGE])[:, None],
        torch.from_numpy(np.stack([SMALL, LARGE]))[:, None],
        [{"segmentation": SMALL, "area": 100}, {"segmentation": LARGE, "area": 3500}],
        [{"segmentation": rle.encode(SMALL)}, {"segmentation": rle.encode(LARGE)}],
    ],
    ids=["array", "tensor", "generator", "generator's RLE"],
)
def test_every_form_of_masks_is_drawn_alike(masks) -> None:
    expected = layer(show_masks(IMAGE, np.stack([SMALL, LARGE]), seed=0)[0])
    assert (layer(show_masks(IMAGE, masks, seed=0)[0]) == expected).all()


def test_candidates_with_scores_get_a_picture_each_with_prompts() -> None:
    panels = show_masks(
        IMAGE,
        np.stack([SMALL, LARGE]),
        [0.5, 0.875],
        point_coords=np.array([[35, 25], [2, 2]]),
        point_labels=np.array([1, 0]),
        box=np.array([5, 5, 75, 55]),
    )
    assert [panel.get_title() for panel in panels] == [
        "Mask 1, score: 0.500",
        "Mask 2, score: 0.875",
    ]
    assert layer(panels[0])[10, 10, 3] == 0
    assert len(panels[0].lines) == 1 and len(panels[0].collections) == 2


def test_scores_of_many_prompts_are_written_on_the_masks() -> None:
    (axes,) = show_masks(IMAGE, np.stack([SMALL, LARGE])[:, None], np.array([[0.5], [0.25]]))
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.25"]


def test_an_axis_of_ones_own_is_drawn_in() -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots()
    assert show_masks(IMAGE[..., 0], [], ax=axes) == [axes]
    assert len(figure.axes) == 1


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="the image's 60 x 80 pixels"):
        show_masks(IMAGE, np.zeros((2, 30, 40), bool))
    with pytest.raises(ValueError, match="a score for each of 1 masks, got 2"):
        show_masks(IMAGE, SMALL[None], [0.1, 0.2])
