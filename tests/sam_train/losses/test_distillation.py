"""The distance of a student from its teacher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sam_train.losses.distillation import TeacherLoss, embedding_errors
from sam_train.losses.mask import MaskLoss
from sam_train.structures import MaskPrediction


def embeddings(seed: int, chans: int = 6) -> Tensor:
    return torch.randn(2, chans, 4, 4, generator=torch.Generator().manual_seed(seed))


EVERYWHERE = torch.ones(2, 4, 4, dtype=torch.bool)


def test_the_error_is_0_for_equal_embeddings_and_1_for_zeros() -> None:
    teacher = embeddings(0)

    equal = embedding_errors(teacher, teacher, EVERYWHERE, out_chans=6)
    zeros = embedding_errors(torch.zeros_like(teacher), teacher, EVERYWHERE, out_chans=6)

    assert equal.tolist() == [0.0, 0.0]
    torch.testing.assert_close(zeros, torch.ones(2))


def test_the_padding_is_left_out() -> None:
    teacher, student = embeddings(0), embeddings(1)
    inside = EVERYWHERE.clone()
    inside[1, 2:] = False
    changed = student.clone()
    changed[1, :, 2:] = 1e3

    before = embedding_errors(student, teacher, inside, out_chans=6)

    assert torch.equal(embedding_errors(changed, teacher, inside, out_chans=6), before)
    changed[1, :, :2] += 1
    assert embedding_errors(changed, teacher, inside, out_chans=6)[1] != before[1]


def test_an_image_counts_by_itself() -> None:
    teacher, student = embeddings(0), embeddings(1)

    both = embedding_errors(student, teacher, EVERYWHERE, out_chans=6)
    alone = embedding_errors(student[1:], teacher[1:], EVERYWHERE[1:], out_chans=6)

    torch.testing.assert_close(both[1:], alone)


def test_fine_features_of_another_scale_count_as_much_as_the_embedding() -> None:
    teacher = embeddings(0)
    scaled = torch.cat([teacher, 100 * teacher], dim=1)

    half_missing = torch.cat([torch.zeros_like(teacher), 100 * teacher], dim=1)
    other_half = torch.cat([teacher, torch.zeros_like(teacher)], dim=1)

    for student in (half_missing, other_half):
        errors = embedding_errors(student, scaled, EVERYWHERE, out_chans=6)
        torch.testing.assert_close(errors, torch.full((2,), 0.5))


def answer(logits: Tensor, ious: Tensor) -> MaskPrediction:
    return MaskPrediction(logits, ious)


@pytest.mark.parametrize("doubt", [-3.0, 0.0, 1.0])
def test_a_student_is_best_where_it_is_as_sure_as_its_teacher(doubt: float) -> None:
    teacher = answer(torch.full((1, 2, 8, 8), doubt), torch.zeros(1, 2))
    loss = TeacherLoss(mask=MaskLoss(focal=0, bce=1, dice=0))

    def of(logit: float) -> float:
        return float(loss(answer(torch.full((1, 2, 8, 8), logit), torch.zeros(1, 2)), teacher)[0])

    assert of(doubt) < min(of(doubt - 0.5), of(doubt + 0.5))


def test_candidates_and_predicted_ious_are_compared_one_by_one() -> None:
    logits = torch.full((1, 2, 8, 8), -10.0)
    logits[0, 0, :4] = 10
    logits[0, 1, :, :4] = 10
    teacher = answer(logits, torch.tensor([[0.9, 0.1]]))
    loss = TeacherLoss(mask=MaskLoss(focal=0, bce=1, dice=1), iou_weight=1.0)

    same = loss(teacher, teacher)
    swapped = loss(answer(logits.flip(1), teacher.iou_predictions), teacher)
    other_ious = loss(answer(logits, torch.tensor([[0.1, 0.9]])), teacher)

    assert same.shape == (1,)
    assert swapped > same + 1
    torch.testing.assert_close(other_ious, same + 0.64)


def test_nothing_flows_back_into_the_teacher() -> None:
    logits, ious = torch.randn(2, 3, 8, 8), torch.rand(2, 3)
    teacher = answer(logits.clone().requires_grad_(), ious.clone().requires_grad_())
    student = answer(logits.clone().requires_grad_(), ious.clone().requires_grad_())

    TeacherLoss()(student, teacher).sum().backward()

    assert student.low_res_masks.grad is not None
    assert teacher.low_res_masks.grad is None
    assert teacher.iou_predictions.grad is None
