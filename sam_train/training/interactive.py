"""Trains a Sam by playing the annotator: prompts, answers, corrections (SAM, appendix A)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sam_train.data.source import DamagedSampleError, sample_seed
from sam_train.losses.multimask import InteractiveLoss
from sam_train.metrics.click_rollout import click_rollout
from sam_train.metrics.clicks import ClickMetrics
from sam_train.models.sam import Sam
from sam_train.ops.coords import boxes_to_grid, cells_inside, prompts_to_input
from sam_train.prompts.draws import PromptDraws
from sam_train.prompts.simulator import Interaction, PromptSimulator
from sam_train.structures import (
    BOX_TOP_LEFT,
    ImageBatch,
    ImageFeatures,
    ImageRecord,
    MaskPrediction,
    Prompts,
)
from sam_train.training import figures
from sam_train.training.bounded import decode_bounded
from sam_train.training.first_guess import GuessTeaching, Peer, Question, halve, select_masks
from sam_train.training.module import TrainingModule
from sam_train.training.non_finite import NonFiniteGuard
from sam_train.training.optim import AdamW

log = logging.getLogger(__name__)

SOMETIMES_LEFT_OUT = re.compile(r"no_mask_embed|mask_downscaling|first_guess\.ious|k_proj\.bias")
"""Names of weights that a batch may not ask for: with or without a mask to begin with, and what a
softmax takes out again."""
NOT_GUESSED = re.compile(r"prompt_encoder\.|mask_decoder\.(?!first_guess\.(?!read\.))")
"""Names of the weights that a first guess by itself has no use for."""


class InteractiveTraining(TrainingModule):
    """One optimiser step: encode the images once, play all prompts on them, learn from every answer.

    Draws depend on the run's seed, the sample and the pass, never on rank or worker, and losses are
    divided by the number of masks on all ranks: one process and many take the same step.

    Args:
        model: what is trained.
        prompts: plays the annotator in training.
        val_prompts: plays the annotator in validation, at original resolution.
        loss: of one answer.
        optim: builds the optimiser and knows the schedule.
        first_guess: teaches the decoder's first guess with more prompts, where the model has one.
        half_size_share: share of the run, from its start, that trains on images of half the size.
        non_finite: what happens to a loss or a gradient that is not finite; stops the run by default.
        checkpoint_passes: keeps no pass's activations until the backward pass but computes them again:
            memory then is that of one pass, whatever their number, for a forward pass more of the decoder.
        mask_chunk: masks decoded at a time, each chunk recomputed like that; bounds the memory whatever
            an image holds. None takes all at once.
        seed: of the order of the passes, and of what is random within the model.
    """

    panels = (
        ("loss", ("train/loss", "train/guess_loss", "train/played_loss")),
        ("IoU in training", ("train/iou_point", "train/iou_box")),
        ("IoU in validation", ("val/mean_iou@1", "val/mean_iou@3", "val/box_mean_iou")),
        (
            "gradient norm, unclipped",
            ("grad_norm/image_encoder", "grad_norm/prompt_encoder", "grad_norm/mask_decoder"),
        ),
    )
    model: Sam
    val_metrics: ClickMetrics

    def __init__(
        self,
        *,
        model: Sam,
        prompts: PromptSimulator,
        val_prompts: PromptSimulator,
        loss: InteractiveLoss,
        optim: AdamW,
        first_guess: GuessTeaching | None = None,
        half_size_share: float = 0.0,
        non_finite: NonFiniteGuard | None = None,
        checkpoint_passes: bool = False,
        mask_chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model=model, optim=optim, non_finite=non_finite, seed=seed)
        if mask_chunk is not None and mask_chunk < 1:
            raise ValueError(f"mask_chunk is 1 or more, or null, got {mask_chunk}")
        if not 0 <= half_size_share <= 1:
            raise ValueError(f"half_size_share is in [0, 1], got {half_size_share}")
        if half_size_share and model.image_encoder.img_size % (2 * model.image_encoder.stride):
            raise ValueError(
                f"half of img_size={model.image_encoder.img_size} is no multiple of the stride "
                f"{model.image_encoder.stride}: set task.half_size_share=0"
            )
        if model.image_encoder.in_chans != 3:
            raise ValueError(
                f"images are read as RGB, but the image encoder takes {model.image_encoder.in_chans} "
                "channels: train with model.image_encoder.in_chans=3"
            )
        if first_guess is not None and model.mask_decoder.first_guess is None:
            log.warning("the model has no first guess: task.first_guess is left out")
            first_guess = None
        self.prompts = prompts
        self.val_prompts = val_prompts
        self.loss = loss
        self.first_guess = first_guess
        self.half_size_share = half_size_share
        self.checkpoint_passes, self.mask_chunk = checkpoint_passes, mask_chunk
        self.has_played = False
        """Whether the transformer was asked since the last optimiser step."""
        self.val_metrics = ClickMetrics(val_prompts.num_corrections + 1)
        if not self._feeds_masks_back():
            # No mask ever reaches these weights, and a distributed run would wait for their gradients.
            self.model.prompt_encoder.mask_downscaling.requires_grad_(False)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Plays all passes on a batch; returns the loss, a mean over masks and passes."""
        self._seed_batch()
        loss = self._at_current_size(batch)
        self._note_loss(loss, batch.keys)
        return loss

    def _at_current_size(self, batch: ImageBatch) -> Tensor:
        if self.half_size_share == 0 or self._progress_of_all() >= self.half_size_share:
            return self._loss(batch)
        full_size = self.model.image_encoder.img_size
        self.model.set_img_size(full_size // 2)
        try:
            return self._loss(halve(batch))
        finally:
            self.model.set_img_size(full_size)

    def _loss(self, batch: ImageBatch) -> Tensor:
        return self._prompted_loss(self.model.encode(batch.images, batch.input_sizes), batch)

    def _prompted_loss(
        self, features: ImageFeatures, batch: ImageBatch, peer: Peer | None = None
    ) -> Tensor:
        """Teaches the first guess and plays the passes; a peer may have a say in the losses."""
        counts = torch.bincount(batch.image_index, minlength=len(batch.images)).tolist()
        draws = PromptDraws.from_seeds(batch.seeds, counts, device=batch.masks.device)
        teaching = self.first_guess
        if teaching is None:
            return self._played_loss(features, batch, draws, peer)
        guesses = teaching.loss(self.model, features, batch, draws, self.loss, peer)
        guess_loss = guesses.sum() / self._mean_over_ranks(len(guesses))
        self.log("train/guess_loss", guess_loss.detach())
        if teaching.alone_share > 0 and self._progress_of_all() < teaching.alone_share:
            return teaching.weight * guess_loss + self._nothing_left_out(NOT_GUESSED)
        rows = teaching.played(batch, draws)
        if teaching.teaches_encoder_alone:
            features = ImageFeatures(features.image_embeddings.detach())
        played = self._played_loss(features, select_masks(batch, rows), draws.select(rows), peer)
        self.log("train/played_loss", played.detach())
        return played + teaching.weight * guess_loss

    def _played_loss(
        self,
        features: ImageFeatures,
        batch: ImageBatch,
        draws: PromptDraws,
        peer: Peer | None = None,
    ) -> Tensor:
        """Plays all passes on the masks of a batch; a mean over masks and passes."""
        self.has_played = True
        stride = self.model.image_encoder.img_size / batch.masks.shape[-1]

        def decode(prompts: Prompts, multimask_output: bool) -> MaskPrediction:
            return decode_bounded(
                self.model,
                features,
                prompts_to_input(prompts, stride),
                image_index=batch.image_index,
                multimask_output=multimask_output,
                recompute=self.checkpoint_passes,
                chunk=self.mask_chunk,
            )

        # What is predicted on the padding is no error that anyone would click on.
        num_cells = batch.masks.shape[-1]
        inside = cells_inside(batch.input_sizes, num_cells, stride)[batch.image_index]
        plan = self.prompts.plan(self._plan_generator())
        rollout = self.prompts.rollout(
            decode,
            batch.masks,
            boxes_to_grid(batch.boxes, stride),
            draws,
            plan,
            to_masks=lambda logits: (logits > 0) & inside,
        )
        share = 1 / self._mean_over_ranks(len(batch.masks))
        total = torch.zeros((), device=batch.masks.device)
        for interaction in rollout:
            answer = self.loss(interaction.prediction, batch.masks)
            losses = answer.total
            if peer is not None:
                asked = prompts_to_input(interaction.prompts, stride)
                is_first = interaction.pass_index == 0
                question = Question(asked, batch.image_index, is_first, is_guess=False)
                losses = peer.mixed(question, interaction.prediction, losses)
            total = total + losses.sum() * share
            self._log_answer(interaction, answer.candidate_ious, answer.mask)
        return total / len(plan.new_prompt) + self._nothing_left_out()

    def validation_step(self, record: ImageRecord, batch_idx: int) -> None:
        """Clicks through the masks of one image."""
        try:
            curves = click_rollout(self.model, record, self.val_prompts, seed=self.seed)
        except DamagedSampleError:  # counted and logged already
            return
        self.num_val_images += 1
        self.val_source = record.source
        self.val_metrics.update(curves, record.source)

    def _new_metrics(self) -> ClickMetrics:
        return ClickMetrics(self.val_prompts.num_corrections + 1, self.val_sources)

    def draw_examples(
        self, folder: Path, step: int, records: Iterable[ImageRecord], number: int
    ) -> None:
        figures.draw_clicks(folder / f"clicks_step{step:06d}.png", self, records, number)

    def _feeds_masks_back(self) -> bool:
        simulator = self.prompts
        return bool(
            simulator.num_corrections + simulator.num_extra_passes or simulator.mask_prob > 0
        )

    def _nothing_left_out(self, names: re.Pattern[str] = SOMETIMES_LEFT_OUT) -> Tensor:
        """Zero, with the weights in its graph that not every batch asks for.

        A distributed run would wait for their gradients, and one process would pass over them where
        many do not.
        """
        named = self.model.named_parameters()
        left_out = [p for name, p in named if p.requires_grad and names.search(name)]
        return sum((0.0 * p.sum() for p in left_out), torch.zeros((), device=self.device))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves the weights that nobody asked for where they are: zeros would let them decay."""
        if not self.has_played:
            for name, parameter in self.model.named_parameters():
                if NOT_GUESSED.search(name):
                    parameter.grad = None
        self.has_played = False
        super().on_before_optimizer_step(optimizer)

    def _plan_generator(self) -> torch.Generator:
        """The same on all ranks, so that all run the same passes."""
        return torch.Generator().manual_seed(sample_seed(self.seed, self._batch_number(), "plan"))

    def _log_answer(
        self, interaction: Interaction, candidate_ious: Tensor, mask_loss: Tensor
    ) -> None:
        chosen_ious = candidate_ious.gather(1, interaction.chosen[:, None])[:, 0]
        figures = {f"train/iou_pass{interaction.pass_index}": chosen_ious.mean()}
        if interaction.pass_index == 0:
            figures["train/mask_loss_pass0"] = mask_loss.detach().mean()
            is_box = interaction.prompts.point_labels[:, 0] == BOX_TOP_LEFT
            # Not a number where there is none: Lightning would repeat the last batch's figure.
            figures["train/iou_point"] = chosen_ious[~is_box].mean()
            figures["train/iou_box"] = chosen_ious[is_box].mean()
        self.log_dict(figures)
