"""Clicks through the objects of an image, measured at the image's original resolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sam_train.data.source import sample_seed
from sam_train.metrics.clicks import NOC_IOUS, REPORTED_CLICKS, ClickCurves
from sam_train.models.sam import Sam
from sam_train.ops.boxes import masks_to_boxes
from sam_train.ops.coords import to_input_frame
from sam_train.ops.drawing import ClickStep
from sam_train.ops.masks import mask_area, mask_iou
from sam_train.ops.resize import resize_longest_side
from sam_train.ops.rle import decode_many
from sam_train.prompts.draws import PromptDraws
from sam_train.prompts.masks import best_candidate, chosen_logits
from sam_train.prompts.simulator import PromptSimulator, box_prompts
from sam_train.structures import ImageFeatures, ImageRecord, MaskPrediction, Prompts

MAX_MASK_BYTES = 1 << 28
"""Ground truth of more objects than fit in here (a byte a pixel) is played in several goes."""
MAX_LOGITS = 1 << 24
"""Logits at full resolution that are made at a time (4 bytes each)."""


@dataclass(frozen=True)
class EncodedImage:
    """An image the model has seen: prompts in its original frame go in, its masks come out.

    Attributes:
        model: in eval mode.
        features: of this one image.
        original_size: (H, W) of the image.
        input_size: (H, W) in the model input frame.
    """

    model: Sam
    features: ImageFeatures
    original_size: tuple[int, int]
    input_size: tuple[int, int]

    @classmethod
    def encode(cls, model: Sam, image: np.ndarray) -> EncodedImage:
        """Resizes an (H, W, 3) uint8 RGB image to the model input and encodes it."""
        side = model.image_encoder.img_size
        resized = resize_longest_side(image, side)
        input_size = resized.shape[0], resized.shape[1]
        padded = np.zeros((side, side, 3), np.uint8)
        padded[: input_size[0], : input_size[1]] = resized
        images = torch.from_numpy(padded).permute(2, 0, 1)[None].to(model.device)
        features = model.encode(images, torch.tensor([input_size], device=model.device))
        return cls(model, features, (image.shape[0], image.shape[1]), input_size)

    def decode(self, prompts: Prompts, multimask_output: bool) -> MaskPrediction:
        """Answers prompts in the original frame."""
        coords = to_input_frame(prompts.point_coords, self.original_size, self.input_size)
        return self.model.decode(
            self.features,
            prompts._replace(point_coords=coords),
            multimask_output=multimask_output,
        )

    def masks(self, low_res_masks: Tensor) -> Tensor:
        """Takes logits (P, h, w) to masks (P, H, W) bool at original resolution.

        A few objects at a time: only the masks of all are ever held, never their logits.
        """
        side = self.model.image_encoder.img_size
        pixels = max(side**2, self.original_size[0] * self.original_size[1])
        pieces = [
            self.model.postprocess_masks(piece[:, None], self.input_size, self.original_size)[:, 0]
            > self.model.mask_threshold
            for piece in low_res_masks.split(max(1, MAX_LOGITS // pixels))
        ]
        return torch.cat(pieces)


class ClickPass(NamedTuple):
    """The state of n objects after a click.

    Attributes:
        objects: (n,) int64, indices into the ground truth that is played on.
        prompts: of these objects, original frame.
        masks: (n, H, W) bool, the candidates of highest predicted IoU.
        ious: (n,) float, of these masks.
        predicted_ious: (n,) float.
        best_ious: (n,) float, of the best candidates.
    """

    objects: Tensor
    prompts: Prompts
    masks: Tensor
    ious: Tensor
    predicted_ious: Tensor
    best_ious: Tensor


@torch.inference_mode()
def play_clicks(
    image: EncodedImage, gt_masks: Tensor, simulator: PromptSimulator, draws: PromptDraws
) -> Iterator[ClickPass]:
    """Clicks on all objects at once: a first prompt, then the simulator's corrections.

    After the ninth click only objects go on that have not been at an IoU of 0.90 yet: no figure asks
    how the others fare.

    Args:
        image: the image, encoded.
        gt_masks: (P, H, W) bool at original resolution, none empty.
        simulator: clicks; its extra passes are of training and not made here.
        draws: the random numbers of these objects, if the simulator uses any.
    """
    objects = torch.arange(len(gt_masks), device=gt_masks.device)
    best_so_far = torch.zeros(len(gt_masks), device=gt_masks.device)
    prompts = simulator.first_prompts(gt_masks, None, draws)
    for index in range(simulator.num_corrections + 1):
        prediction = image.decode(prompts, index == 0)
        state, chosen = _measure(image, objects, prompts, prediction, gt_masks)
        yield state
        best_so_far = torch.maximum(best_so_far, state.ious)
        mask_inputs, pred_masks = chosen_logits(prediction, chosen), state.masks
        if index + 1 >= REPORTED_CLICKS:
            goes_on = best_so_far < NOC_IOUS["90"]
            objects, best_so_far = objects[goes_on], best_so_far[goes_on]
            gt_masks, pred_masks = gt_masks[goes_on], pred_masks[goes_on]
            mask_inputs, draws = mask_inputs[goes_on], draws.select(goes_on)
            prompts = Prompts(prompts.point_coords[goes_on], prompts.point_labels[goes_on])
        if index == simulator.num_corrections or not len(objects):
            return
        prompts = simulator.correct(prompts, gt_masks, pred_masks, draws.for_pass(index + 1))
        prompts = prompts._replace(mask_inputs=mask_inputs)


def _measure(
    image: EncodedImage,
    objects: Tensor,
    prompts: Prompts,
    prediction: MaskPrediction,
    gt_masks: Tensor,
) -> tuple[ClickPass, Tensor]:
    """Scores all candidates at original resolution; also returns which of them were chosen."""
    chosen = best_candidate(prediction)
    rows = torch.arange(len(chosen), device=chosen.device)
    num_candidates = prediction.low_res_masks.shape[1]
    masks = image.masks(prediction.low_res_masks.flatten(0, 1))
    masks = masks.view(-1, num_candidates, *masks.shape[1:])
    ious = mask_iou(masks, gt_masks[:, None])
    state = ClickPass(
        objects=objects,
        prompts=prompts,
        masks=masks[rows, chosen],
        ious=ious[rows, chosen],
        predicted_ious=prediction.iou_predictions[rows, chosen].float(),
        best_ious=ious.amax(dim=1),
    )
    return state, chosen


@torch.inference_mode()
def click_rollout(
    model: Sam,
    record: ImageRecord,
    simulator: PromptSimulator,
    *,
    with_box: bool = True,
    chunk_size: int = 64,
    seed: int = 0,
) -> ClickCurves:
    """Clicks through the objects of one image; the image is encoded once.

    Args:
        model: in eval mode.
        record: the image; its annotations without a pixel are left out.
        simulator: `num_corrections` + 1 clicks are made; `conf/prompts/clicks.yaml` is the protocol of
            the published figures, and a small `num_corrections` a quick form of it.
        with_box: also ask for each object's tight box alone, without noise.
        chunk_size: objects decoded at a time, at most; no figure depends on it.
        seed: of the simulator's draws, if it makes any.
    """
    image = EncodedImage.encode(model, record.image)
    draws = draws_of(record, seed, model.device)
    curves = []
    for objects, gt_masks in object_chunks(record, chunk_size, model.device):
        ious, predicted, oracle = _play(image, gt_masks, simulator, draws.select(objects))
        box_ious = _box_ious(image, gt_masks, with_box)
        areas = mask_area(gt_masks)
        curves.append(ClickCurves(ious, predicted, oracle, box_ious, areas, objects))
    return ClickCurves(*(torch.cat(parts).cpu() for parts in zip(*curves, strict=True)))


def object_chunks(
    record: ImageRecord, chunk_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The objects of an image that have a pixel, as many at a time as fit.

    Yields:
        Indices (n,) of annotations and their ground truth (n, H, W) bool; n may be 0.
    """
    height, width = record.size
    chunk_size = max(1, min(chunk_size, MAX_MASK_BYTES // (height * width)))
    for objects in torch.arange(len(record.annotations)).split(chunk_size):
        gt_masks = _gt_masks(record, objects.tolist()).to(device)
        kept = mask_area(gt_masks) > 0
        yield objects.to(device)[kept], gt_masks[kept]


def draws_of(record: ImageRecord, seed: int, device: torch.device) -> PromptDraws:
    """The random numbers for all objects of an image."""
    return PromptDraws.from_seeds(
        [sample_seed(seed, 0, record.key)], [len(record.annotations)], device=device
    )


def _gt_masks(record: ImageRecord, objects: Sequence[int]) -> Tensor:
    try:
        return torch.from_numpy(decode_many([record.annotations[i].rle for i in objects]))
    except ValueError as error:
        raise record.damaged(error) from None


@torch.inference_mode()
def trace_clicks(
    model: Sam,
    record: ImageRecord,
    objects: Sequence[int],
    simulator: PromptSimulator,
    *,
    clicks: Sequence[int] = (1, 2, 3, 9),
    seed: int = 0,
) -> list[list[ClickStep]]:
    """What `click_rollout` with the same arguments saw after some of the clicks, to draw it.

    Args:
        model: in eval mode.
        record: the image.
        objects: indices into its annotations, none of them empty.
        simulator: makes the clicks.
        clicks: the numbers of the clicks to keep; those that are never made are left out.
        seed: of the simulator's draws, if it makes any.

    Returns:
        For each object its steps, for `ops.drawing.click_strip`.
    """
    simulator = replace(
        simulator,
        num_corrections=min(simulator.num_corrections, max(clicks) - 1),
        num_extra_passes=0,
    )
    image = EncodedImage.encode(model, record.image)
    gt_masks = _gt_masks(record, objects).to(model.device)
    draws = draws_of(record, seed, model.device).select(torch.tensor(objects, device=model.device))
    traces: list[list[ClickStep]] = [[] for _ in objects]
    for number, state in enumerate(play_clicks(image, gt_masks, simulator, draws), start=1):
        if number not in clicks:
            continue
        coords, labels = (part.cpu().numpy() for part in state.prompts[:2])
        masks, ious = state.masks.cpu().numpy(), state.ious.tolist()
        plural = "s" if number > 1 else ""
        for row, i in enumerate(state.objects.tolist()):
            caption = f"{number} click{plural}: IoU {ious[row]:.2f}"
            traces[i].append(ClickStep(coords[row], labels[row], masks[row], caption))
    return traces


def _play(
    image: EncodedImage, gt_masks: Tensor, simulator: PromptSimulator, draws: PromptDraws
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the IoUs (P, K), the predicted ones (P, K) and the oracle's of the first click (P,)."""
    num_clicks = simulator.num_corrections + 1
    ious = torch.full((len(gt_masks), num_clicks), torch.nan, device=gt_masks.device)
    predicted, oracle = ious.clone(), ious[:, 0].clone()
    if len(gt_masks):
        for click, state in enumerate(play_clicks(image, gt_masks, simulator, draws)):
            ious[state.objects, click] = state.ious
            predicted[state.objects, click] = state.predicted_ious
            if click == 0:
                oracle = state.best_ious
    return ious, predicted, oracle


def _box_ious(image: EncodedImage, gt_masks: Tensor, with_box: bool) -> Tensor:
    """IoU of the masks for tight boxes: (P,), NaN where boxes are not asked for."""
    if not with_box or not len(gt_masks):
        return torch.full((len(gt_masks),), torch.nan, device=gt_masks.device)
    prediction = image.decode(box_prompts(masks_to_boxes(gt_masks)), True)
    logits = chosen_logits(prediction, best_candidate(prediction))
    return mask_iou(image.masks(logits[:, 0]), gt_masks)
