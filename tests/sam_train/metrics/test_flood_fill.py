import numpy as np
import pytest

from sam_train.metrics.flood_fill import flood_fill_mask, score_flood_fill
from sam_train.ops import rle
from sam_train.structures import Annotation, ImageRecord


def square(side=20, start=5, stop=14):
    mask = np.zeros((side, side), bool)
    mask[start:stop, start:stop] = True
    return mask


def record(image, masks):
    annotations = tuple(
        Annotation(
            id=i,
            rle=rle.encode(mask),
            bbox=(0, 0, 1, 1),
            area=float(mask.sum()),
        )
        for i, mask in enumerate(masks)
    )
    return ImageRecord(key="a", size=image.shape[:2], annotations=annotations, load=lambda: image)


def test_a_fixed_range_stops_where_a_floating_one_follows_the_gradient():
    image = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2)

    fixed = flood_fill_mask(image, (0, 0), 35)
    floating = flood_fill_mask(image, (0, 0), 10, fixed_range=False)

    assert fixed.sum() == 20 * 4
    assert floating.all()


def test_the_fill_does_not_touch_the_image():
    image = np.full((20, 20, 3), 7, np.uint8)
    image.setflags(write=False)

    assert flood_fill_mask(image, (3, 3), 0).all()
    assert (image == 7).all()


def test_one_tolerance_is_chosen_for_the_whole_set():
    mask = square()
    clean = np.where(mask, 200, 50).astype(np.uint8)[..., None].repeat(3, 2)
    # Within this square neighbours differ by 40 levels, so small tolerances stop at once.
    checks = np.indices(mask.shape).sum(0) % 2 * 40
    noisy = np.where(mask, 160 + checks, 50).astype(np.uint8)[..., None].repeat(3, 2)

    score = score_flood_fill([record(clean, [mask]), record(noisy, [mask])], (5, 50))

    assert score.table[True, 5] == pytest.approx((1 + 1 / 81) / 2)
    assert score.mean_iou == score.table[True, 50] == 1
    assert (score.fixed_range, score.tolerance) == (True, 50)
    assert (score.num_images, score.num_masks) == (2, 2)


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="at least one record"):
        score_flood_fill([])
