"""A student beside its teacher: the same prompts, and how near the answers are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sam_train.metrics.agreement import TaughtMetrics, teacher_agreement
from sam_train.metrics.click_rollout import click_rollout
from sam_train.models.sam import Sam
from sam_train.prompts.simulator import PromptSimulator
from sam_train.structures import ImageRecord

CLICKS = PromptSimulator(
    box_prob=0.0,
    click_sampling="center",
    exclude_clicked=True,
    num_corrections=2,
    num_extra_passes=0,
)


def changed(model: Sam, scale: float) -> Sam:
    """Another model, near or far."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.image_encoder.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


def test_a_model_agrees_with_itself(tiny_sam: Sam, synthetic_scenes: list[ImageRecord]) -> None:
    agreement = teacher_agreement(tiny_sam, tiny_sam, synthetic_scenes[0], CLICKS)

    num_objects = len(synthetic_scenes[0].annotations)
    assert agreement.ious.shape == (num_objects, 3)
    assert (agreement.ious == 1).all()
    assert (agreement.box_ious == 1).all()
    assert agreement.embedding_error == 0


def test_the_nearer_student_agrees_more(tiny_sam: Sam, synthetic_scenes: list[ImageRecord]) -> None:
    near, far = (
        teacher_agreement(changed(tiny_sam, scale), tiny_sam, synthetic_scenes[0], CLICKS)
        for scale in (0.001, 0.1)
    )

    assert 0 < near.embedding_error < far.embedding_error
    assert far.ious.mean() < near.ious.mean() < 1


def test_all_students_get_the_same_points(
    tiny_sam: Sam, synthetic_scenes: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def points_asked(student: Sam) -> list[Any]:
        asked: list[Any] = []
        answer = student.decode

        def decode(features: Any, prompts: Any, **kwargs: Any) -> Any:
            asked.append((prompts.point_coords.tolist(), prompts.mask_inputs is not None))
            return answer(features, prompts, **kwargs)

        monkeypatch.setattr(student, "decode", decode)
        teacher_agreement(student, tiny_sam, synthetic_scenes[0], CLICKS)
        return asked

    first, second = points_asked(changed(tiny_sam, 0.01)), points_asked(changed(tiny_sam, 0.1))

    assert first == second
    assert [has_mask for _, has_mask in first] == [False, False, True, True]  # box, three clicks


def test_objects_without_a_pixel_are_left_out_of_both(
    tiny_sam: Sam, synthetic_scenes: list[ImageRecord]
) -> None:
    from dataclasses import replace

    from sam_train.ops.rle import encode

    record = synthetic_scenes[0]
    empty = replace(record.annotations[0], rle=encode(torch.zeros(96, 96).bool().numpy()))
    record = replace(record, annotations=(empty, *record.annotations[1:]))

    curves = click_rollout(tiny_sam, record, CLICKS)
    agreement = teacher_agreement(changed(tiny_sam, 0.01), tiny_sam, record, CLICKS)

    assert len(agreement.ious) == len(curves.ious) == len(record.annotations) - 1


def test_scores_are_means_over_masks_and_the_embedding_error_over_images(
    tiny_sam: Sam, synthetic_scenes: list[ImageRecord]
) -> None:
    student = changed(tiny_sam, 0.02)
    metrics = TaughtMetrics(3)
    agreements = []
    for record in synthetic_scenes[:2]:
        curves = click_rollout(student, record, CLICKS)
        agreements.append(teacher_agreement(student, tiny_sam, record, CLICKS))
        metrics.update_taught(curves, agreements[-1], record.source)

    scores = metrics.compute()

    ious = torch.cat([agreement.ious for agreement in agreements])
    assert scores["teacher_mean_iou@2"] == pytest.approx(float(ious[:, 1].mean()), abs=1e-6)
    errors = [agreement.embedding_error for agreement in agreements]
    assert scores["embedding_error"] == pytest.approx(sum(errors) / 2, abs=1e-6)
    assert {"mean_iou@1", "box_mean_iou", "teacher_box_mean_iou"} <= scores.keys()
    assert not any(name.startswith("embedding_error_") for name in scores)
