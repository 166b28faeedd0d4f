"""What one training step costs: memory by part, and its operations.

A step is run on fake tensors, which have shapes and no numbers, with a `Ledger` around it; docs/estimate.md
states the formulas. Nothing is trained and nothing is read or written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sam_train.models.sam import Sam
from sam_train.structures import BOX_TOP_LEFT, ImageFeatures, MaskPrediction, Prompts
from sam_train.training.bounded import decode_bounded
from sam_train.training.distillation import AskedTeacher, Distillation
from sam_train.training.first_guess import Peer, Question
from sam_train.training.interactive import InteractiveTraining
from sam_train.training.ledger import Ledger, Operation

ROUNDING = 1e-9
"""Of shares of a run."""
SIZES_OF_PRECISION = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.bfloat16}
"""What activations are made in; a half float of the other kind has the same size."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run whose cost is asked for.

    Attributes:
        batch_size: images of one process in one pass forward and back.
        num_masks: masks of these images, at most.
        precision: Lightning's name for it.
        processes: how many train at once.
        accumulate: batches to an optimiser step.
        max_steps: optimiser steps, or -1 where the time ends the run.
        seconds: after which the run ends, or None.
    """

    batch_size: int
    num_masks: int
    precision: str = "32-true"
    processes: int = 1
    accumulate: int = 1
    max_steps: int = -1
    seconds: float | None = None

    @classmethod
    def of_trainer(cls, trainer: Mapping[str, Any], *, batch_size: int, num_masks: int) -> Run:
        """Reads the rest off the settings of conf/trainer."""
        devices = trainer["devices"]
        count = len(devices) if isinstance(devices, list) else devices
        max_time = trainer["max_time"]
        return cls(
            batch_size=batch_size,
            num_masks=num_masks,
            precision=str(trainer["precision"]),
            processes=trainer["num_nodes"] * (count if isinstance(count, int) and count > 0 else 1),
            accumulate=trainer["accumulate_grad_batches"],
            max_steps=trainer["max_steps"],
            seconds=None if max_time is None else _seconds_of(str(max_time)),
        )


class Phase(NamedTuple):
    """A stretch of a run in which all steps are alike.

    Attributes:
        share: of the run.
        img_size: side of the images, pixels.
        num_played: masks that all passes are played on.
        num_guessed: first guesses.
        asks_teacher: there is a teacher, if the training has one.
    """

    share: float
    img_size: int
    num_played: int
    num_guessed: int
    asks_teacher: bool = True


class Memory(NamedTuple):
    """Bytes of one process.

    Attributes:
        weights, gradients, optimiser: what a step leaves, or adds to.
        teacher: weights of a teacher, which are only read.
        kept: by part, what the forward passes keep for the backward pass.
        peak: the most that is alive at once, all of the above included where it is.
    """

    weights: int
    gradients: int
    optimiser: int
    teacher: int
    kept: dict[str, int]
    peak: int


class StepCost(NamedTuple):
    """The memory of a step, and its operations in order."""

    memory: Memory
    operations: list[Operation]


def phases(module: InteractiveTraining, run: Run) -> list[Phase]:
    """The stretches of a run, in order."""
    teaching, side = module.first_guess, module.model.image_encoder.img_size
    alone = teaching.alone_share if teaching is not None else 0.0
    played = run.num_masks
    if teaching is not None and teaching.played_per_image is not None:
        played = min(played, run.batch_size * teaching.played_per_image)
    guessed = run.num_masks * teaching.prompts_per_mask if teaching is not None else 0
    unasked, untaught = 0.0, 1.0
    if isinstance(module, Distillation):
        unasked = module.teaching.embeddings_share
        untaught = max(unasked, 1 - module.teaching.truth_share)  # 1 - 0.9 is less than 0.1
    bounds = sorted({0.0, alone, unasked, untaught, module.half_size_share, 1.0})
    return [
        Phase(
            share=end - start,
            img_size=side // 2 if start < module.half_size_share else side,
            num_played=0 if start < max(alone, unasked) else played,
            num_guessed=0 if start < unasked else guessed,
            asks_teacher=start < untaught,
        )
        for start, end in pairwise(bounds)
        if end - start > ROUNDING
    ]


def step_cost(
    module: InteractiveTraining, run: Run, phase: Phase, *, grad_checkpointing: bool | None = None
) -> StepCost:
    """Counts one optimiser step of one process, without accumulation.

    Args:
        module: on the meta device, so that nothing is copied.
        run: the batch and precision.
        phase: which stretch of the run.
        grad_checkpointing: of the encoder; None leaves it as it is.
    """
    passes = module.prompts.plan(torch.Generator().manual_seed(0)).new_prompt
    ledger = Ledger()
    copied = copy.deepcopy(module.model)
    teacher = module.teacher.model if isinstance(module, Distillation) else None
    copied_teacher = copy.deepcopy(teacher)
    images_of_masks = torch.arange(run.num_masks) % run.batch_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Sam = copied.to_empty(device="cpu")
        model.set_img_size(phase.img_size)
        if run.precision == "bf16-true":
            model.to(torch.bfloat16)
        if grad_checkpointing is not None:
            checkpoint_encoder(model, grad_checkpointing)
        weights = [*model.parameters(), *model.buffers()]
        taught_by: list[Tensor] = []
        if copied_teacher is not None:
            copied_teacher.to_empty(device="cpu").set_img_size(phase.img_size)
            taught_by = [*copied_teacher.parameters(), *copied_teacher.buffers()]
        optimizer = module.optim.build(model)
        ledger.leave_out([*weights, *taught_by])
        with ledger:
            with _autocast(run.precision):
                step = _Step(module, model, copied_teacher, run, phase, ledger)
                loss = step.loss(passes, images_of_masks)
            kept = {name: size for name, size in ledger.alive.items() if size > 0}
            with ledger.part("backward"):
                loss.backward()
            peak_before_step = ledger.peak
            with ledger.part("optimiser"):
                optimizer.step()
        gradients = sum(map(_num_bytes, (p.grad for p in model.parameters() if p.grad is not None)))
        states = [v for state in optimizer.state.values() for v in state.values()]
        state_bytes = sum(_num_bytes(v) for v in states if isinstance(v, Tensor))
    num_weights, num_taught_by = (sum(map(_num_bytes, tensors)) for tensors in (weights, taught_by))
    # From the second step on the optimiser's state lies beside the activations.
    peak = num_weights + num_taught_by + max(peak_before_step + state_bytes, ledger.peak)
    memory = Memory(num_weights, gradients, state_bytes, num_taught_by, kept, peak)
    return StepCost(memory, ledger.operations)


@dataclass(frozen=True)
class _Step:
    """The forward pass of one batch, on tensors without numbers."""

    module: InteractiveTraining
    model: Sam
    teacher: Sam | None
    run: Run
    phase: Phase
    ledger: Ledger

    def loss(self, passes: Sequence[bool], images_of_masks: Tensor) -> Tensor:
        """What the module's `_loss` does, with prompts in place of the simulator's."""
        side, count = self.phase.img_size, self.run.batch_size
        images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
        sizes = torch.full((count, 2), side)
        with self.ledger.part("image encoder"):
            features = self.model.encode(images, sizes)
        total, peer = torch.zeros(()), None
        if isinstance(self.module, Distillation) and self.phase.asks_teacher:
            assert self.teacher is not None
            with self.ledger.part("teacher"):
                taught = self._taught(features, images, sizes)
            with self.ledger.part("loss"):
                total = total + self.module.embedding_errors(features, taught, sizes).sum()
            peer = AskedTeacher(self.teacher, taught, self.module.teaching)
        if self.phase.num_guessed:
            total = total + self._guessed(features, images_of_masks, peer)
        if self.phase.num_played:
            teaching = self.module.first_guess
            if teaching is not None and teaching.teaches_encoder_alone:
                features = ImageFeatures(features.image_embeddings.detach())
            index = images_of_masks[: self.phase.num_played]
            total = total + self._played(features, passes, index, peer)
        return total

    def _taught(self, features: ImageFeatures, images: Tensor, sizes: Tensor) -> ImageFeatures:
        """The teacher's embeddings: computed, or read from a cache."""
        assert isinstance(self.module, Distillation) and self.teacher is not None
        if self.module.teacher.reads_cache:
            return ImageFeatures(torch.zeros(features.image_embeddings.shape))
        with torch.no_grad():
            return self.teacher.encode(images, sizes)

    def _guessed(self, features: ImageFeatures, index: Tensor, peer: Peer | None) -> Tensor:
        teaching = self.module.first_guess
        assert teaching is not None
        index = index.repeat(teaching.prompts_per_mask)
        prompts = _prompts(self.phase.num_guessed, 2)
        with self.ledger.part("first guess"):
            guess = self.model.guess(features, prompts, image_index=index)
            targets = torch.zeros(self.phase.num_guessed, *guess.low_res_masks.shape[-2:])
            losses = self.module.loss(guess, targets).total
        question = Question(prompts, index, True, is_guess=True)
        return self._mixed(peer, question, guess, losses).sum()

    def _played(
        self, features: ImageFeatures, passes: Sequence[bool], index: Tensor, peer: Peer | None
    ) -> Tensor:
        side, played = self.model.low_res_size, self.phase.num_played
        masks = torch.zeros(played, side, side, dtype=torch.bool)
        logits, num_points, total = None, 1, torch.zeros(())
        for number, is_new in enumerate(passes):
            num_points += is_new
            prompts = _prompts(played, num_points)._replace(mask_inputs=logits)
            with self.ledger.part("decoder passes"):
                answer = decode_bounded(
                    self.model,
                    features,
                    prompts,
                    image_index=index,
                    multimask_output=number == 0,
                    recompute=self.module.checkpoint_passes,
                    chunk=self.module.mask_chunk,
                )
            with self.ledger.part("loss"):
                losses = self.module.loss(answer, masks).total
            question = Question(prompts, index, number == 0, is_guess=False)
            total = total + self._mixed(peer, question, answer, losses).sum()
            logits = answer.low_res_masks.detach()[:, :1]
        return total

    def _mixed(
        self, peer: Peer | None, question: Question, answer: MaskPrediction, losses: Tensor
    ) -> Tensor:
        if peer is None:
            return losses
        with self.ledger.part("teacher's answers and their loss"):
            return peer.mixed(question, answer, losses)


def _prompts(count: int, num_points: int) -> Prompts:
    labels = torch.full((count, num_points), BOX_TOP_LEFT)
    return Prompts(torch.zeros(count, num_points, 2), labels)


def checkpoint_encoder(model: Sam, on: bool) -> None:
    """Recomputes the image encoder's blocks in the backward pass, or keeps what they made."""
    backbone = model.image_encoder.backbone
    getattr(backbone, "model", backbone).set_grad_checkpointing(on)


def _seconds_of(max_time: str) -> float:
    """Lightning's DD:HH:MM:SS in seconds."""
    try:
        days, hours, minutes, seconds = map(int, max_time.split(":"))
    except ValueError:
        raise ValueError(f"expected trainer.max_time as DD:HH:MM:SS, got {max_time}") from None
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def _autocast(precision: str) -> AbstractContextManager[Any]:
    dtype = SIZES_OF_PRECISION.get(precision)
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
