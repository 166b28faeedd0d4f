import numpy as np
import pytest
import torch

from sam_train.ops import boxes, rle


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_formats_are_inverse_and_far_edges_are_exclusive(kind):
    xywh = kind([[0.0, 0.0, 1.0, 1.0], [3.0, 4.0, 5.0, 6.5]])

    xyxy = boxes.xywh_to_xyxy(xywh)

    assert xyxy.tolist() == [[0, 0, 1, 1], [3, 4, 8, 10.5]]
    assert boxes.xyxy_to_xywh(xyxy).tolist() == xywh.tolist()


def test_boxes_of_masks_are_those_of_their_run_lengths():
    masks = np.random.default_rng(0).random((40, 9, 13)) < 0.02
    masks[0], masks[1] = False, True

    found = boxes.masks_to_boxes(torch.from_numpy(masks))

    expected = np.array([rle.bbox(rle.encode(mask)) for mask in masks])
    expected[:, 2:] += expected[:, :2]
    np.testing.assert_array_equal(found.numpy(), expected)
    assert boxes.masks_to_boxes(torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0, 4)


def test_a_batch_of_batches_is_refused():
    with pytest.raises(ValueError, match=r"\(P, H, W\)"):
        boxes.masks_to_boxes(torch.zeros(1, 1, 4, 4, dtype=torch.bool))
