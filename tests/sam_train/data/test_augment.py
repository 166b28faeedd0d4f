import numpy as np
import pytest

from sam_train.data.augment import ColourJitter, Flips
from sam_train.ops.coords import View

IMAGE = np.random.default_rng(0).integers(40, 200, (8, 9, 3), dtype=np.uint8)
NONE = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}


def jittered(seed=0, **settings):
    return ColourJitter(**NONE | settings)(IMAGE, np.random.default_rng(seed)).astype(float)


def test_nothing_asked_for_changes_nothing():
    np.testing.assert_array_equal(jittered(), IMAGE)


def test_inversion_is_the_negative_and_grey_has_no_colour():
    np.testing.assert_array_equal(jittered(invert=1), 255 - IMAGE)
    grey = jittered(grey=1)
    assert (grey == grey[..., :1]).all()
    np.testing.assert_allclose(grey[..., 0], IMAGE @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize("seed", range(5))
def test_brightness_scales_and_contrast_keeps_the_mean(seed):
    ratio = jittered(seed, brightness=0.25) / IMAGE
    assert np.ptp(ratio) < 0.05 and 0.74 < ratio.mean() < 1.26
    contrasted = jittered(seed, contrast=0.25)
    assert abs((contrasted - IMAGE).mean(axis=(0, 1)) @ [0.299, 0.587, 0.114]) < 1
    assert 0.74 < contrasted.std() / IMAGE.std() < 1.26


def test_colours_out_of_range_are_clipped_not_wrapped():
    bright = ColourJitter(brightness=1)
    white = np.full((4, 4, 3), 250, np.uint8)
    results = [bright(white, np.random.default_rng(seed)) for seed in range(20)]
    assert max(result.max() for result in results) == 255
    assert all(np.ptp(result) <= 1 for result in results)


def test_all_eight_positions_occur_and_none_when_not_asked():
    view = View(window=(0, 0, 4, 4), resized=(4, 4))
    rng = np.random.default_rng(0)
    flips = Flips(horizontal=0.5, vertical=0.5, transpose=0.5)
    assert len({flips(view, rng) for _ in range(200)}) == 8
    assert Flips(horizontal=0)(view, rng) == view


@pytest.mark.parametrize("kind", [Flips, ColourJitter])
def test_a_probability_out_of_range_is_refused(kind):
    name = "vertical" if kind is Flips else "grey"
    with pytest.raises(ValueError, match=name):
        kind(**{name: 1.5})
