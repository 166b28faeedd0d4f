import numpy as np
import pytest
import torch
from segment_anything.utils.amg import calculate_stability_score

from sam_train.ops.masks import is_empty, mask_area, mask_iou, stability_score


def random_masks(*shape: int, seed: int = 0, share: float = 0.3) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def test_areas_are_counts_of_pixels():
    masks = random_masks(2, 3, 17, 9)

    assert mask_area(masks).dtype == torch.int64
    assert mask_area(masks).tolist() == [[int(m.numpy().sum()) for m in row] for row in masks]


def test_iou_is_that_of_a_count_pixel_by_pixel():
    a, b = random_masks(6, 13, 11, seed=1), random_masks(6, 13, 11, seed=2, share=0.6)
    expected = []
    for one, other in zip(a.numpy(), b.numpy(), strict=True):
        both = sum(x and y for x, y in zip(one.flat, other.flat, strict=True))
        either = sum(x or y for x, y in zip(one.flat, other.flat, strict=True))
        expected.append(both / either)

    assert np.allclose(mask_iou(a, b), expected)
    assert torch.equal(mask_iou(a[:, None], b[None])[2, 3], mask_iou(a[2], b[3]))


@pytest.mark.parametrize(("a", "b", "iou"), [(0, 0, 1.0), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0)])
def test_iou_of_empty_and_full_masks(a, b, iou):
    a, b = (torch.full((1, 5, 4), bool(value)) for value in (a, b))

    assert mask_iou(a, b).tolist() == [iou]


def test_a_mask_is_empty_until_it_has_a_pixel():
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[1, 4, 6] = True
    masks[2] = True

    assert is_empty(masks).tolist() == [True, False, False]


def test_stability_is_that_of_segment_anything():
    logits = torch.randn(4, 3, 24, 20, generator=torch.Generator().manual_seed(3)) * 3
    expected = calculate_stability_score(logits, mask_threshold=0.5, threshold_offset=1.0)

    ours = stability_score(logits, mask_threshold=0.5, threshold_offset=1.0)

    assert torch.allclose(ours, expected)
    assert 0 < ours.min() < ours.max() < 1
    assert stability_score(logits - 99, mask_threshold=0, threshold_offset=1).eq(1).all()
