"""Focal, cross-entropy and dice: by hand, and against torchvision's focal loss."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from sam_train.losses.mask import MaskLoss, dice_loss


def scene(seed: int = 0, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three candidates for each of two objects of 6 x 5 pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, 3, 6, 5, generator=generator)
    return logits, torch.rand(2, 6, 5, generator=generator) < 0.4


def test_focal_of_two_pixels_by_hand() -> None:
    logits = torch.tensor([[[[0.0, math.log(3.0)]]]])  # probabilities 1/2 and 3/4
    gt_masks = torch.tensor([[[True, False]]])

    loss = MaskLoss(focal=20.0, dice=0.0)(logits, gt_masks)

    missed = 0.25 * 0.5**2 * -math.log(0.5)
    false_alarm = 0.75 * 0.75**2 * -math.log(0.25)
    assert loss.item() == pytest.approx(20 * (missed + false_alarm) / 2, rel=1e-5)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 1.0), (0.9, 3.0)])
def test_focal_equals_torchvisions(alpha: float, gamma: float) -> None:
    logits, gt_masks = scene()

    loss = MaskLoss(focal=2.0, dice=0.0, focal_alpha=alpha, focal_gamma=gamma)(logits, gt_masks)

    target = gt_masks[:, None].float().expand_as(logits)
    theirs = sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(loss, 2 * theirs.mean(dim=(-2, -1)))


def test_cross_entropy_is_the_mean_over_pixels() -> None:
    logits = torch.tensor([[[[0.0, math.log(3.0)]]]])
    gt_masks = torch.tensor([[[True, False]]])

    loss = MaskLoss(focal=0.0, bce=3.0, dice=0.0)(logits, gt_masks)

    assert loss.item() == pytest.approx(3 * -(math.log(0.5) + math.log(0.25)) / 2)


def test_dice_by_hand() -> None:
    probability = torch.tensor([[0.5, 1.0], [0.0, 0.5]])
    target = torch.tensor([[1.0, 1.0], [0.0, 0.0]])

    # Overlap 1.5; both together 2 + 2; one pixel more on either side.
    areas = probability.sum() + target.sum()
    assert dice_loss((probability * target).sum(), areas).item() == pytest.approx(
        1 - (2 * 1.5 + 1) / (4 + 1)
    )


@pytest.mark.parametrize("empty", [True, False])
def test_a_sure_and_right_answer_costs_nothing(empty: bool) -> None:
    gt_masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    gt_masks[:, 2:5] = not empty
    logits = 40.0 * (gt_masks[:, None].float() * 2 - 1)

    assert MaskLoss(focal=20.0, bce=1.0, dice=1.0)(logits, gt_masks).item() < 1e-6
    assert MaskLoss(focal=20.0, bce=1.0, dice=1.0)(-logits, gt_masks).item() > 1


def test_the_parts_add_up_by_their_weights() -> None:
    logits, gt_masks = scene()
    focal = MaskLoss(focal=1.0, dice=0.0)(logits, gt_masks)
    bce = MaskLoss(focal=0.0, bce=1.0, dice=0.0)(logits, gt_masks)
    dice = MaskLoss(focal=0.0, dice=1.0)(logits, gt_masks)

    loss = MaskLoss(focal=20.0, bce=0.5, dice=2.0)(logits, gt_masks)

    torch.testing.assert_close(loss, 20 * focal + 0.5 * bce + 2 * dice)
    assert loss.shape == (2, 3)


def test_the_default_is_the_papers() -> None:
    assert (MaskLoss().focal, MaskLoss().bce, MaskLoss().dice) == (20.0, 0.0, 1.0)


def test_mixed_precision_does_not_touch_the_loss() -> None:
    logits, gt_masks = scene()
    exact = MaskLoss(bce=1.0)(logits, gt_masks)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = MaskLoss(bce=1.0)(logits, gt_masks)
        of_rounded = MaskLoss(bce=1.0)(logits.bfloat16(), gt_masks)

    assert torch.equal(under_autocast, exact)
    assert of_rounded.dtype == torch.float32
    torch.testing.assert_close(of_rounded, MaskLoss(bce=1.0)(logits.bfloat16().float(), gt_masks))


def test_logits_far_out_keep_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[[[-1e4, 1e4], [1e4, -1e4]]]], requires_grad=True)
    gt_masks = torch.tensor([[[True, False], [True, False]]])

    loss = MaskLoss(bce=1.0)(logits, gt_masks)
    loss.backward()

    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_ground_truth_on_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grid of the logits, \(6, 5\), got \(3, 5\)"):
        MaskLoss()(scene()[0], torch.zeros(2, 3, 5, dtype=torch.bool))
