"""Prompts of many kinds, on many images, answered in few passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from sam_train.models.sam import Sam
from sam_train.structures import ImageFeatures, MaskPrediction, Prompts

PROMPTS_PER_PASS = 64
"""Prompts decoded together. Each takes several copies of the image's tokens: 4 MB a copy at 1024 px."""
MAX_LOGITS = 1 << 24
"""Logits at full resolution that are made at a time (4 bytes each)."""


def decode_in_passes(
    model: Sam,
    features: ImageFeatures,
    prompts: Prompts,
    *,
    image_index: Tensor | None = None,
    multimask_output: bool,
) -> MaskPrediction:
    """`Sam.decode`, for any number of prompts, none included, in bounded memory."""
    if not len(prompts.point_coords):
        return no_answers(model, multimask_output)
    answers = [
        model.decode(
            features,
            Prompts(
                prompts.point_coords[rows],
                prompts.point_labels[rows],
                None if prompts.mask_inputs is None else prompts.mask_inputs[rows],
            ),
            image_index=None if image_index is None else image_index[rows],
            multimask_output=multimask_output,
        )
        for rows in _passes(len(prompts.point_coords))
    ]
    return MaskPrediction(*map(torch.cat, zip(*answers, strict=True)))


def decode_mixed(
    model: Sam,
    features: ImageFeatures,
    prompts: Sequence[Prompts],
    image_index: Sequence[int],
    *,
    multimask_output: bool,
) -> list[MaskPrediction]:
    """Answers prompts of different kinds and lengths.

    Those of one length are decoded together. None is padded to the length of another, as each padding
    token takes part in the attention and changes the answer.

    Args:
        model: the model.
        features: of N images.
        prompts: one object each, model input frame.
        image_index: below N, a prompt each.
        multimask_output: three candidates a prompt, else one.

    Returns:
        The answers in the order of the prompts, one object each.
    """
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[prompt.point_labels.shape[1], prompt.mask_inputs is not None].append(place)
    answers: dict[int, MaskPrediction] = {}
    for (_, has_masks), places in groups.items():
        masks = [prompts[i].mask_inputs for i in places] if has_masks else []
        together = Prompts(
            torch.cat([prompts[i].point_coords for i in places]),
            torch.cat([prompts[i].point_labels for i in places]),
            torch.cat([mask for mask in masks if mask is not None]) if masks else None,
        )
        index = torch.tensor([image_index[i] for i in places], device=model.device)
        found = decode_in_passes(
            model,
            features,
            together,
            # Of one image no copies are made.
            image_index=index if len(features.image_embeddings) > 1 else None,
            multimask_output=multimask_output,
        )
        for row, place in enumerate(places):
            answers[place] = MaskPrediction(*(part[row : row + 1] for part in found))
    return [answers[i] for i in range(len(prompts))]


def full_size(
    model: Sam,
    low_res_masks: Tensor,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    *,
    return_logits: bool = False,
) -> Tensor:
    """Takes logits (P, M, h, w) to masks (P, M, H, W) bool, or to logits there.

    A few at a time, so that of all masks only the bools are ever held.
    """
    side = model.image_encoder.img_size
    at_once = max(1, MAX_LOGITS // max(side**2, original_size[0] * original_size[1]))
    pieces = []
    for piece in low_res_masks.flatten(0, 1)[:, None].split(at_once):
        logits = model.postprocess_masks(piece, input_size, original_size)[:, 0]
        pieces.append(logits if return_logits else logits > model.mask_threshold)
    return torch.cat(pieces).unflatten(0, low_res_masks.shape[:2])


def no_answers(model: Sam, multimask_output: bool) -> MaskPrediction:
    """What no prompt at all is answered with."""
    num_masks = model.mask_decoder.num_multimask_outputs if multimask_output else 1
    low_res_masks = torch.zeros(
        0, num_masks, model.low_res_size, model.low_res_size, device=model.device
    )
    return MaskPrediction(low_res_masks, low_res_masks.new_zeros(0, num_masks))


def _passes(num_prompts: int) -> list[slice]:
    starts = range(0, num_prompts, PROMPTS_PER_PASS)
    return [slice(start, start + PROMPTS_PER_PASS) for start in starts]
