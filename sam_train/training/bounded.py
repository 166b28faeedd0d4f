"""Answers to the prompts of a pass within a bounded memory, and what to do where it is not enough."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sam_train.models.sam import Sam
from sam_train.structures import ImageFeatures, MaskPrediction, Prompts

ADVICE = """What saves memory, and how much (estimate=true tells the need before a run):
  data.batch_size=N             activations of the encoder and all passes, in proportion; accumulate instead:
                                trainer.accumulate_grad_batches=N; data.batch_size=auto takes what fits
  data.train_transform.max_masks=N or data.max_masks_per_batch=N
                                activations of the passes, in proportion
  task.checkpoint_passes=true   all passes but one are computed again: their memory divided by their number
  task.mask_chunk=N             the same pass by pass, N masks at a time: bounded whatever an image holds
  model.image_encoder.grad_checkpointing=true
                                the encoder keeps its blocks' inputs only
  trainer.precision=bf16-mixed  half of all activations
  finetune=decoder              nothing is kept for the encoder, nor its optimiser state"""


def decode_bounded(
    model: Sam,
    features: ImageFeatures,
    prompts: Prompts,
    *,
    image_index: Tensor,
    multimask_output: bool,
    recompute: bool,
    chunk: int | None,
) -> MaskPrediction:
    """`Sam.decode`, keeping what the settings allow for the backward pass.

    Args:
        model: see `Sam.decode` for this and the following four.
        features: of N images.
        prompts: P of them, model input frame.
        image_index: (P,).
        multimask_output: three candidates, or one.
        recompute: keeps nothing but the answers, and computes the rest again in the backward pass.
        chunk: prompts decoded at a time, which implies `recompute`; None takes all at once.
    """

    def decode(rows: slice) -> tuple[Tensor, Tensor]:
        coords, labels, masks = prompts
        asked = Prompts(coords[rows], labels[rows], None if masks is None else masks[rows])
        answer = model.decode(
            features, asked, image_index=image_index[rows], multimask_output=multimask_output
        )
        return answer.low_res_masks, answer.iou_predictions

    count = max(1, len(image_index))
    size = count if chunk is None else chunk
    chunks = [slice(start, start + size) for start in range(0, count, size)]
    if recompute or chunk is not None:
        answers = [checkpoint(decode, rows, use_reentrant=False) for rows in chunks]
    else:
        answers = [decode(rows) for rows in chunks]
    if len(answers) == 1:
        return MaskPrediction(*answers[0])
    return MaskPrediction(*(torch.cat(parts) for parts in zip(*answers, strict=True)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of the memory of a device or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )
