"""How near a student's answers are to its teacher's: both are asked the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sam_train.losses.distillation import embedding_errors
from sam_train.metrics.click_rollout import (
    EncodedImage,
    draws_of,
    object_chunks,
    play_clicks,
)
from sam_train.metrics.clicks import REPORTED_CLICKS, ClickCurves, ClickMetrics
from sam_train.models.sam import Sam
from sam_train.ops.boxes import masks_to_boxes
from sam_train.ops.coords import cells_inside
from sam_train.ops.masks import mask_iou
from sam_train.prompts.masks import best_candidate, chosen_logits
from sam_train.prompts.simulator import PromptSimulator, box_prompts
from sam_train.structures import ImageRecord, Prompts


class Agreement(NamedTuple):
    """A student beside its teacher on P objects of one image.

    Attributes:
        ious: (P, K) float, of the two models' masks after each of K clicks.
        box_ious: (P,) float, of their masks for the tight box alone.
        embedding_error: of the image, as in `embedding_errors`.
    """

    ious: Tensor
    box_ious: Tensor
    embedding_error: float


@torch.inference_mode()
def teacher_agreement(
    student: Sam,
    teacher: Sam,
    record: ImageRecord,
    simulator: PromptSimulator,
    *,
    chunk_size: int = 64,
    seed: int = 0,
) -> Agreement:
    """Clicks where the teacher is wrong, and asks the student the same.

    The clicks follow from the teacher and the ground truth alone, so that all its students get the same
    prompts. Each model is fed its own earlier masks.

    Args:
        student: in eval mode.
        teacher: in eval mode, of the student's input size.
        record: the image with the ground truth.
        simulator: makes the clicks, as for `click_rollout`; nine at most are made.
        chunk_size: objects decoded at a time.
        seed: of the simulator's draws, if it makes any.
    """
    simulator = replace(
        simulator, num_corrections=min(simulator.num_corrections, REPORTED_CLICKS - 1)
    )
    asked = EncodedImage.encode(student, record.image), EncodedImage.encode(teacher, record.image)
    draws = draws_of(record, seed, teacher.device)
    ious, box_ious = [torch.zeros(0, simulator.num_corrections + 1)], [torch.zeros(0)]
    for objects, gt_masks in object_chunks(record, chunk_size, teacher.device):
        if not len(objects):
            continue
        boxes = box_prompts(masks_to_boxes(gt_masks))
        student_masks, teacher_masks = (_answer(image, boxes, True)[0] for image in asked)
        box_ious.append(mask_iou(student_masks, teacher_masks).cpu())
        columns, mask_inputs = [], None
        for index, state in enumerate(
            play_clicks(asked[1], gt_masks, simulator, draws.select(objects))
        ):
            prompts = state.prompts._replace(mask_inputs=mask_inputs)
            student_masks, mask_inputs = _answer(asked[0], prompts, index == 0)
            columns.append(mask_iou(student_masks, state.masks).cpu())
        ious.append(torch.stack(columns, dim=1))
    return Agreement(torch.cat(ious), torch.cat(box_ious), _embedding_error(*asked))


def _answer(image: EncodedImage, prompts: Prompts, multimask_output: bool) -> tuple[Tensor, Tensor]:
    """The masks (P, H, W) of highest predicted IoU, and their logits (P, 1, h, w)."""
    prediction = image.decode(prompts, multimask_output)
    logits = chosen_logits(prediction, best_candidate(prediction))
    return image.masks(logits[:, 0]), logits


def _embedding_error(student: EncodedImage, teacher: EncodedImage) -> float:
    embeddings = student.features.image_embeddings, teacher.features.image_embeddings
    encoder = teacher.model.image_encoder
    sizes = torch.tensor([teacher.input_size], device=embeddings[0].device)
    inside = cells_inside(sizes, embeddings[0].shape[-1], encoder.stride)
    return float(embedding_errors(*embeddings, inside, out_chans=encoder.out_chans))


class TaughtMetrics(ClickMetrics):
    """A student's scores: against the ground truth, as `ClickMetrics`, and beside its teacher.

    `teacher_mean_iou@k` and `teacher_box_mean_iou` are means over masks, `embedding_error` over images.
    """

    def __init__(self, num_clicks: int, sources: Sequence[str] = ()) -> None:
        super().__init__(num_clicks, sources)

    @property
    def names(self) -> tuple[str, ...]:
        """See `ClickMetrics`."""
        clicks = (f"teacher_mean_iou@{k + 1}" for k in range(self.num_reported))
        return (*super().names, *clicks, "teacher_box_mean_iou", "embedding_error")

    def update_taught(self, curves: ClickCurves, agreement: Agreement, source: str = "") -> None:
        """Adds the objects of one image, the same in both and in the same order."""
        error = torch.full_like(agreement.box_ious, torch.nan)
        error[:1] = agreement.embedding_error  # once an image, however many masks it has
        beside = [*agreement.ious.unbind(1), agreement.box_ious, error]
        values = torch.cat([self._values(curves).cpu(), torch.stack(beside, dim=1)], dim=1)
        self._add(values, curves.areas, source)

    def _named(self, means: Tensor, prefix: str = "") -> dict[str, float]:
        named = super()._named(means, prefix)
        # An image has no object size.
        return {k: v for k, v in named.items() if "embedding_error_" not in k}
