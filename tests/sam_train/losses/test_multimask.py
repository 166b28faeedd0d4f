"""Of several candidates the best one learns; predicted IoUs learn the true ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sam_train.losses.mask import MaskLoss
from sam_train.losses.multimask import InteractiveLoss
from sam_train.structures import MaskPrediction

SURE = 5.0


def square(left: int, right: int) -> Tensor:
    """Columns `left` to `right` of an 8 x 8 grid."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, left:right] = True
    return mask


def answer(candidates: list[list[Tensor]], predicted: list[list[float]]) -> MaskPrediction:
    """Sure logits of the given masks, a list of candidates an object; with gradients."""
    masks = torch.stack([torch.stack(masks) for masks in candidates])
    logits = SURE * (2 * masks.float() - 1)
    return MaskPrediction(logits.requires_grad_(), torch.tensor(predicted, requires_grad=True))


@pytest.fixture
def two_objects() -> tuple[MaskPrediction, Tensor]:
    """The third candidate is right for the first object, the first for the second."""
    gt_masks = torch.stack([square(0, 4), square(4, 8)])
    candidates = [
        [square(4, 8), square(0, 8), square(0, 4)],
        [square(4, 8), square(0, 4), square(0, 2)],
    ]
    return answer(candidates, [[0.9, 0.2, 0.1], [0.1, 0.8, 0.3]]), gt_masks


def test_only_the_candidate_of_lowest_loss_learns(
    two_objects: tuple[MaskPrediction, Tensor],
) -> None:
    prediction, gt_masks = two_objects

    InteractiveLoss()(prediction, gt_masks).total.sum().backward()

    gradient = prediction.low_res_masks.grad
    assert gradient is not None
    learns = gradient.flatten(2).abs().sum(-1) > 0
    assert learns.tolist() == [[False, False, True], [True, False, False]]


def test_the_lowest_loss_counts_and_not_the_highest_predicted_iou(
    two_objects: tuple[MaskPrediction, Tensor],
) -> None:
    prediction, gt_masks = two_objects

    answered = InteractiveLoss()(prediction, gt_masks)

    right = MaskLoss()(SURE * (2.0 * gt_masks[:, None].float() - 1), gt_masks)[:, 0]
    torch.testing.assert_close(answered.mask, right)


def test_the_true_ious_are_those_of_the_masks(two_objects: tuple[MaskPrediction, Tensor]) -> None:
    prediction, gt_masks = two_objects

    ious = InteractiveLoss()(prediction, gt_masks).candidate_ious

    assert ious.tolist() == [[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]
    assert not ious.requires_grad


def test_all_predicted_ious_learn_unless_told_otherwise(
    two_objects: tuple[MaskPrediction, Tensor],
) -> None:
    prediction, gt_masks = two_objects

    everyone = InteractiveLoss()(prediction, gt_masks).iou
    chosen = InteractiveLoss(supervise_all_ious=False)(prediction, gt_masks).iou

    first = [0.9**2, (0.2 - 0.5) ** 2, (0.1 - 1) ** 2]
    second = [(0.1 - 1) ** 2, 0.8**2, 0.3**2]
    torch.testing.assert_close(everyone, torch.tensor([sum(first) / 3, sum(second) / 3]))
    torch.testing.assert_close(chosen, torch.tensor([first[2], second[0]]))

    chosen.sum().backward()
    gradient = prediction.iou_predictions.grad
    assert gradient is not None
    assert (gradient != 0).tolist() == [[False, False, True], [True, False, False]]


def test_the_iou_error_weighs_as_told_and_leaves_the_masks_alone(
    two_objects: tuple[MaskPrediction, Tensor],
) -> None:
    prediction, gt_masks = two_objects
    answered = InteractiveLoss(iou_weight=3.0)(prediction, gt_masks)

    torch.testing.assert_close(answered.total, answered.mask + 3 * answered.iou)
    answered.iou.sum().backward()
    assert prediction.low_res_masks.grad is None


def test_a_single_candidate_is_the_best_one() -> None:
    prediction = answer([[square(0, 2)]], [[0.5]])

    answered = InteractiveLoss()(prediction, square(0, 4)[None])

    assert answered.candidate_ious.tolist() == [[0.5]]
    assert answered.iou.item() == pytest.approx(0.0)


def test_mixed_precision_gives_a_float32_loss(two_objects: tuple[MaskPrediction, Tensor]) -> None:
    prediction, gt_masks = two_objects
    exact = InteractiveLoss()(prediction, gt_masks)
    halved = MaskPrediction(*(part.detach().bfloat16() for part in prediction))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = InteractiveLoss()(prediction, gt_masks)
        of_rounded = InteractiveLoss()(halved, gt_masks)

    for got, expected in zip(under_autocast, exact, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
    assert all(part.dtype == torch.float32 for part in of_rounded)


def test_ground_truth_may_be_the_covered_share_of_each_cell() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 8, 8, generator=generator) > 0.5
    prediction = MaskPrediction(
        torch.randn(3, 2, 8, 8, generator=generator), torch.rand(3, 2, generator=generator)
    )
    loss = InteractiveLoss()
    for whole, share in zip(loss(prediction, masks), loss(prediction, masks.float()), strict=True):
        torch.testing.assert_close(whole, share)

    half = torch.full((3, 8, 8), 0.5)
    unsure, sure = (
        loss.mask(torch.full((3, 1, 8, 8), logit), half).mean().item() for logit in (0.0, 9.0)
    )
    assert unsure < sure, "half a cell is best answered with one half"
