"""Teaches the first guess: many first prompts a mask, for little more than the price of the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.losses.multimask import InteractiveLoss
from sam_train.models.sam import Sam
from sam_train.ops.coords import boxes_to_grid, prompts_to_input
from sam_train.prompts.draws import PromptDraws
from sam_train.prompts.simulator import PromptSimulator
from sam_train.structures import ImageBatch, ImageFeatures, MaskPrediction, Prompts


class Question(NamedTuple):
    """What the trained model was asked, with its input and not its answer.

    Attributes:
        prompts: of P objects, model input frame.
        image_index: (P,) the image of each in the batch.
        multimask_output: candidates were asked for, else one mask.
        is_guess: only the decoder's first guess was asked for.
    """

    prompts: Prompts
    image_index: Tensor
    multimask_output: bool
    is_guess: bool


class Peer(Protocol):
    """Another model that is asked what the trained one is asked, and has a say in its losses."""

    def mixed(self, question: Question, answer: MaskPrediction, gt_losses: Tensor) -> Tensor:
        """The losses to learn from: (P,), of an answer whose losses by the ground truth are known."""
        ...


DRAWS_OF_GUESSES = 1000
"""Draws from here on are of guesses: none has the numbers of the passes that are played."""


@dataclass(frozen=True, kw_only=True)
class GuessTeaching:
    """How the decoder's first guess is taught beside the passes that are played.

    Attributes:
        prompts: gives first prompts; nothing is corrected here.
        prompts_per_mask: guesses at each mask in a step.
        played_per_image: masks of each image that also go through all passes, transformer and all; None
            plays every one. The guess takes the rest of a crowded image for a few milliseconds.
        alone_share: share of the run, from its start, in which nothing is played.
        teaches_encoder_alone: the played passes leave the encoder as it is. From random
            weights their gradients, of few prompts and an unready transformer, undo what guesses teach.
        weight: of this loss beside that of the passes.
    """

    prompts: PromptSimulator
    prompts_per_mask: int = 4
    played_per_image: int | None = None
    alone_share: float = 0.0
    teaches_encoder_alone: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        per_image = 1 if self.played_per_image is None else self.played_per_image
        if self.prompts_per_mask < 1 or per_image < 1 or self.weight < 0:
            raise ValueError(
                "expected prompts_per_mask >= 1, played_per_image >= 1 or null and weight >= 0, got "
                f"{self.prompts_per_mask}, {self.played_per_image} and {self.weight}"
            )
        if not 0 <= self.alone_share <= 1:
            raise ValueError(f"alone_share is in [0, 1], got {self.alone_share}")

    def played(self, batch: ImageBatch, draws: PromptDraws) -> Tensor:
        """Rows of the masks that go through all passes: (R,) int64, drawn per image."""
        rows = torch.arange(len(batch.masks), device=batch.masks.device)
        if self.played_per_image is None:
            return rows
        numbers = draws.variant(DRAWS_OF_GUESSES).for_pass(0).uniform(1)[:, 0]
        is_before = (numbers[:, None] > numbers) & (batch.image_index[:, None] == batch.image_index)
        return rows[is_before.sum(dim=1) < self.played_per_image]

    def loss(
        self,
        model: Sam,
        features: ImageFeatures,
        batch: ImageBatch,
        draws: PromptDraws,
        loss: InteractiveLoss,
        peer: Peer | None = None,
    ) -> Tensor:
        """The losses of all guesses at all masks of the batch: (P * prompts_per_mask,)."""
        stride = model.image_encoder.img_size / batch.masks.shape[-1]
        boxes = boxes_to_grid(batch.boxes, stride)
        prompts = [
            self.prompts.first_prompts(batch.masks, boxes, draws.variant(DRAWS_OF_GUESSES + 1 + i))
            for i in range(self.prompts_per_mask)
        ]
        coords = torch.cat([prompt.point_coords for prompt in prompts])
        labels = torch.cat([prompt.point_labels for prompt in prompts])
        asked = prompts_to_input(Prompts(coords, labels), stride)
        image_index = batch.image_index.repeat(self.prompts_per_mask)
        guess = model.guess(features, asked, image_index=image_index)
        targets = covered_share(batch.masks, guess.low_res_masks.shape[-1])
        losses = loss(guess, targets.repeat(self.prompts_per_mask, 1, 1)).total
        if peer is None:
            return losses
        return peer.mixed(Question(asked, image_index, True, is_guess=True), guess, losses)


def covered_share(masks: Tensor, side: int) -> Tensor:
    """How much of each of a coarser grid's cells a mask covers: (P, h, w) bool to (P, side, side).

    In shares of the mask's best covered cell, as `ToSample` has it: a mask too thin to fill half a cell
    would else be answered best with nothing.
    """
    covered = F.adaptive_avg_pool2d(masks.float(), (side, side))
    best = covered.flatten(1).amax(dim=1)[:, None, None]
    return covered / best.clamp(min=torch.finfo(covered.dtype).tiny)


def halve(batch: ImageBatch) -> ImageBatch:
    """The same batch at half the size: a quarter of the work, for the time when shapes are still coarse."""
    images = batch.images.float()
    for image, (height, width) in zip(images, batch.input_sizes.tolist(), strict=True):
        # Where the last row or column stands alone, its other half is padding: it counts twice instead.
        if height % 2:
            image[:, height] = image[:, height - 1]
        if width % 2:
            image[:, :, width] = image[:, :, width - 1]
    return batch._replace(
        images=F.avg_pool2d(images, 2),
        input_sizes=(batch.input_sizes + 1) // 2,
        masks=covered_share(batch.masks, batch.masks.shape[-1] // 2) >= 0.5,
        boxes=batch.boxes / 2,
    )


def select_masks(batch: ImageBatch, rows: Tensor) -> ImageBatch:
    """The batch with some of its masks."""
    return batch._replace(
        masks=batch.masks[rows], boxes=batch.boxes[rows], image_index=batch.image_index[rows]
    )
