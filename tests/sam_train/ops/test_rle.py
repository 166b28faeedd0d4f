import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam_train.ops import rle


def random_masks(count: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = []
    for index in range(count):
        mask = rng.random(rng.integers(1, 40, 2)) < rng.random()
        if index % 6 == 0:
            mask[:] = index % 12 == 0
        masks.append(mask)
    return masks


@pytest.mark.parametrize("mask", random_masks())
def test_measures_agree_with_the_pixels_and_with_pycocotools(mask):
    reference = coco_mask.encode(np.asfortranarray(mask, np.uint8))

    encoded = rle.encode(mask)

    assert encoded == {"size": list(mask.shape), "counts": reference["counts"].decode()}
    np.testing.assert_array_equal(rle.decode(encoded), mask)
    assert rle.area(encoded) == mask.sum()
    assert rle.bbox(encoded) == tuple(coco_mask.toBbox(reference))


@pytest.mark.parametrize("mask", random_masks(20))
def test_uncompressed_counts_mean_the_same(mask):
    encoded = rle.encode(mask)
    plain = {"size": encoded["size"], "counts": rle.run_lengths(encoded).tolist()}

    np.testing.assert_array_equal(rle.decode(plain), mask)
    assert rle.compress(plain) == encoded
    assert rle.bbox(plain) == rle.bbox(encoded)


def test_masks_of_one_size_decode_together_and_none_is_no_error():
    masks = np.random.default_rng(0).random((5, 7, 9)) < 0.5

    np.testing.assert_array_equal(rle.decode_many([rle.encode(mask) for mask in masks]), masks)
    assert rle.decode_many([]).shape == (0, 0, 0)
    with pytest.raises(ValueError, match="one size"):
        rle.decode_many([rle.encode(masks[0]), rle.encode(masks[0].T)])


GOOD = rle.encode(np.eye(4, dtype=bool))


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ([[1.0, 2.0, 3.0, 4.0]], "polygons need sam-convert"),
        ({"size": [4, 4]}, "with keys"),
        ({**GOOD, "size": [4]}, "two positive integers"),
        ({**GOOD, "size": [4, -4]}, "two positive integers"),
        ({**GOOD, "size": "44"}, "two positive integers"),
        ({**GOOD, "size": [4, 5]}, "4 x 5 has 20"),
        ({**GOOD, "counts": GOOD["counts"][:-1]}, "cover"),
        ({**GOOD, "counts": "z"}, "characters outside"),
        ({**GOOD, "counts": "\u00e9"}, "not ASCII"),
        ({**GOOD, "counts": "o"}, "end within a number"),
        ({**GOOD, "counts": "o" * 30 + "0"}, "35 bits"),
        ({**GOOD, "counts": [20, -4]}, "negative"),
        ({**GOOD, "counts": [0.5, 15.5]}, "list of integers"),
        ({**GOOD, "counts": ""}, "cover 0 pixels"),
    ],
)
def test_a_damaged_rle_is_refused_with_what_is_wrong(damaged, message):
    with pytest.raises(ValueError, match=message):
        rle.decode(damaged)


@pytest.mark.parametrize(
    "counts",
    [[2**70, 5], [2**63 - 1, 2**63 - 1, 2 + 24 * 32], [-1, 24 * 32 + 1], [24 * 32 + 1, -1]],
)
def test_run_lengths_that_no_mask_has_are_refused_and_do_not_wrap_round(counts):
    with pytest.raises(ValueError, match="the RLE is damaged"):
        rle.Runs({"size": [24, 32], "counts": counts})
