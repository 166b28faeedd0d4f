"""What a training will cost, before it is started: memory by part, time of a step and of the run.

A step is run on fake tensors, which have shapes and no numbers, with a `Ledger` around it; docs/estimate.md
states the formulas. Nothing is trained and nothing is read or written.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sam_train.models.sam import Sam
from sam_train.structures import BOX_TOP_LEFT, ImageFeatures, Prompts
from sam_train.training.bounded import ADVICE, decode_bounded
from sam_train.training.interactive import InteractiveTraining
from sam_train.training.ledger import Ledger, Operation
from sam_train.training.optim import parameter_table

SIZES_OF_PRECISION = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.bfloat16}
"""What activations are made in; a half float of the other kind has the same size."""
GIB = 2**30
OVERHEAD = 1.5
"""What a process holds over its tensors at most (docs/estimate.md)."""


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
    """A stretch of a run in which all steps are alike: its share, the images' side, what is played."""

    share: float
    img_size: int
    num_played: int


class Memory(NamedTuple):
    """Bytes of one process.

    Attributes:
        weights, gradients, optimiser: what a step leaves, or adds to.
        kept: by part, what the forward passes keep for the backward pass.
        peak: the most that is alive at once, all of the above included where it is.
    """

    weights: int
    gradients: int
    optimiser: int
    kept: dict[str, int]
    peak: int


@dataclass(frozen=True)
class Speed:
    """How fast a machine is.

    Attributes:
        flops: multiplications and additions a second, in large matrix products.
        moved: bytes a second, read and written.
        seconds_per_operation: of the smallest operation.
    """

    flops: float
    moved: float = float("inf")
    seconds_per_operation: float = 0.0

    def seconds(self, operations: Sequence[Operation]) -> float:
        """Each operation takes as long as its arithmetic or its memory traffic, and a little to begin."""
        return sum(
            max(op.flops / self.flops, op.moved / self.moved) + self.seconds_per_operation
            for op in operations
        )


class StepCost(NamedTuple):
    """The memory of a step, and its operations in order."""

    memory: Memory
    operations: list[Operation]


def phases(module: InteractiveTraining, run: Run) -> list[Phase]:
    """The stretches of a run, the last of which needs the most memory."""
    teaching, side = module.first_guess, module.model.image_encoder.img_size
    alone = teaching.alone_share if teaching is not None else 0.0
    played = run.num_masks
    if teaching is not None and teaching.played_per_image is not None:
        played = min(played, run.batch_size * teaching.played_per_image)
    bounds = sorted({0.0, alone, module.half_size_share, 1.0})
    return [
        Phase(
            share=end - start,
            img_size=side // 2 if start < module.half_size_share else side,
            num_played=0 if start < alone else played,
        )
        for start, end in pairwise(bounds)
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
    images_of_masks = torch.arange(run.num_masks) % run.batch_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Sam = copied.to_empty(device="cpu")
        model.set_img_size(phase.img_size)
        if run.precision == "bf16-true":
            model.to(torch.bfloat16)
        if grad_checkpointing is not None:
            checkpoint_encoder(model, grad_checkpointing)
        weights = [*model.parameters(), *model.buffers()]
        optimizer = module.optim.build(model)
        ledger.leave_out(weights)
        with ledger:
            with _autocast(run.precision):
                loss = _loss(module, model, run, phase, passes, images_of_masks, ledger)
            kept = {name: size for name, size in ledger.alive.items() if size > 0}
            with ledger.part("backward"):
                loss.backward()
            peak_before_step = ledger.peak
            with ledger.part("optimiser"):
                optimizer.step()
        gradients = sum(map(_num_bytes, (p.grad for p in model.parameters() if p.grad is not None)))
        states = [v for state in optimizer.state.values() for v in state.values()]
        state_bytes = sum(_num_bytes(v) for v in states if isinstance(v, Tensor))
    num_weights = sum(map(_num_bytes, weights))
    # From the second step on the optimiser's state lies beside the activations.
    peak = num_weights + max(peak_before_step + state_bytes, ledger.peak)
    return StepCost(Memory(num_weights, gradients, state_bytes, kept, peak), ledger.operations)


def _loss(
    module: InteractiveTraining,
    model: Sam,
    run: Run,
    phase: Phase,
    passes: Sequence[bool],
    images_of_masks: Tensor,
    ledger: Ledger,
) -> Tensor:
    """The passes of `InteractiveTraining._loss`, with prompts in place of the simulator's."""
    images = torch.zeros(run.batch_size, 3, phase.img_size, phase.img_size, dtype=torch.uint8)
    sizes = torch.full((run.batch_size, 2), phase.img_size)
    with ledger.part("image encoder"):
        features = model.encode(images, sizes)
    total = torch.zeros(())
    teaching = module.first_guess
    if teaching is not None:
        num_guesses = run.num_masks * teaching.prompts_per_mask
        with ledger.part("first guess"):
            index = images_of_masks.repeat(teaching.prompts_per_mask)
            guess = model.guess(features, _prompts(num_guesses, 2), image_index=index)
            targets = torch.zeros(num_guesses, *guess.low_res_masks.shape[-2:])
            total = total + module.loss(guess, targets).total.sum()
        if teaching.teaches_encoder_alone:
            features = ImageFeatures(features.image_embeddings.detach())
    if phase.num_played == 0:
        return total
    index = images_of_masks[: phase.num_played]
    side = model.low_res_size
    masks = torch.zeros(phase.num_played, side, side, dtype=torch.bool)
    logits, num_points = None, 1
    for number, is_new in enumerate(passes):
        num_points += is_new
        with ledger.part("decoder passes"):
            prompts = _prompts(phase.num_played, num_points)._replace(mask_inputs=logits)
            answer = decode_bounded(
                model,
                features,
                prompts,
                image_index=index,
                multimask_output=number == 0,
                recompute=module.checkpoint_passes,
                chunk=module.mask_chunk,
            )
        with ledger.part("loss"):
            total = total + module.loss(answer, masks).total.sum()
        logits = answer.low_res_masks.detach()[:, :1]
    return total


def _prompts(count: int, num_points: int) -> Prompts:
    labels = torch.full((count, num_points), BOX_TOP_LEFT)
    return Prompts(torch.zeros(count, num_points, 2), labels)


def fitting_batch_size(
    module: InteractiveTraining, run: Run, most_masks: int | None, free_bytes: float
) -> int:
    """The largest number of images whose step fits.

    A step's peak grows in proportion to the images: it is counted for one and for two. A process holds
    up to `OVERHEAD` times its tensors.

    Args:
        module: on the meta device.
        run: a batch of one image with as many masks as one may have.
        most_masks: of a batch, or None.
        free_bytes: of the device.

    Raises:
        ValueError: not even one fits.
    """

    def peak(batch_size: int) -> float:
        masks = batch_size * run.num_masks
        masks = masks if most_masks is None else min(masks, most_masks)
        larger = replace(run, batch_size=batch_size, num_masks=masks)
        return OVERHEAD * step_cost(module, larger, phases(module, larger)[-1]).memory.peak

    one, two = peak(1), peak(2)
    if one > free_bytes:
        raise ValueError(
            f"data.batch_size=auto: a single image takes {_gib(one)}, {_gib(free_bytes)} are free.\n{ADVICE}"
        )
    return 1 + int((free_bytes - one) / max(two - one, 1.0))


def checkpoint_encoder(model: Sam, on: bool) -> None:
    """Recomputes the image encoder's blocks in the backward pass, or keeps what they made."""
    backbone = model.image_encoder.backbone
    getattr(backbone, "model", backbone).set_grad_checkpointing(on)


def is_checkpointed(model: Sam) -> bool:
    """Whether the image encoder recomputes its blocks."""
    modules = model.image_encoder.modules()
    return any(getattr(module, "grad_checkpointing", False) for module in modules)


def can_checkpoint(model: Sam) -> bool:
    """Whether the image encoder is trained and knows how to recompute its blocks."""
    encoder: Any = model.image_encoder
    is_trained = any(parameter.requires_grad for parameter in encoder.parameters())
    return is_trained and hasattr(getattr(encoder, "backbone", None), "set_grad_checkpointing")


def measure_speed(
    device: str, precision: str = "32-true", clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """Times a large matrix product, a large sum and a small one on this machine, for half a second each."""
    is_half = precision != "32-true" and device != "cpu"
    dtype = torch.bfloat16 if is_half else torch.float32
    side = 1024 if device == "cpu" else 8192
    left, right = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    large = torch.rand(2**24, device=device)
    small = torch.rand(8, device=device, requires_grad=True)
    return Speed(
        flops=2 * side**3 / _seconds(lambda: left @ right, device, clock),
        moved=3 * _num_bytes(large) / _seconds(lambda: torch.add(large, large), device, clock),
        seconds_per_operation=_seconds(lambda: small + small, device, clock),
    )


def _seconds(work: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    """Mean time of a call, after a first one."""

    def synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    work()
    synchronize()
    start, count = clock(), 0
    while (spent := clock() - start) < 0.5:
        work()
        synchronize()
        count += 1
    return spent / count


def report(module: InteractiveTraining, run: Run, speed: Speed, machine: str) -> str:
    """The estimate as text.

    Args:
        module: on the meta device.
        run: what is asked for.
        speed: of the machine, measured or stated.
        machine: what the speed is of.
    """
    stretches = phases(module, run)
    costs = [step_cost(module, run, phase) for phase in stretches]
    last = costs[-1]
    lines = ["parameters", parameter_table(module.model), ""]
    lines += [f"memory of one process, {run.batch_size} images with {run.num_masks} masks in all"]
    lines += _memory_lines(last.memory)
    if can_checkpoint(module.model):
        on = not is_checkpointed(module.model)
        other = step_cost(module, run, stretches[-1], grad_checkpointing=on)
        lines += [
            f"model.image_encoder.grad_checkpointing={str(on).lower()}: a peak of "
            f"{_gib(other.memory.peak)}, {_duration(speed.seconds(other.operations))} a batch"
        ]
    lines += ["", f"time on {machine}: {speed.flops / 1e12:.3g} TFLOP/s"]
    batch_seconds = [speed.seconds(cost.operations) for cost in costs]
    for phase, cost, seconds in zip(stretches, costs, batch_seconds, strict=True):
        tflops = sum(op.flops for op in cost.operations) / 1e12
        played = f"{phase.num_played} masks played" if phase.num_played else "guesses alone"
        lines += [
            f"{phase.share:.0%} of the run at {phase.img_size} px, {played}: {tflops:.3g} TFLOP, "
            f"{_duration(seconds)} a batch"
        ]
    mean = sum(p.share * s for p, s in zip(stretches, batch_seconds, strict=True))
    lines += _run_lines(run, mean * run.accumulate)
    return "\n".join(lines)


def _memory_lines(memory: Memory) -> Iterator[str]:
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser state": memory.optimiser,
        **{f"{part}, kept for backward": size for part, size in memory.kept.items()},
        "peak of a step": memory.peak,
    }
    for name, size in rows.items():
        yield f"{name:<36}{_gib(size):>12}"
    yield "a process holds more than its tensors: 1.3 to 1.5 times as much on a CPU (docs/estimate.md)"


def _run_lines(run: Run, step_seconds: float) -> list[str]:
    images = run.batch_size * run.accumulate * run.processes
    lines = [
        f"a step: {_duration(step_seconds)}, {images} images on {run.processes} process"
        f"{'es' if run.processes > 1 else ''}"
        + (f", {run.accumulate} batches each" if run.accumulate > 1 else "")
    ]
    by_steps = run.max_steps * step_seconds if run.max_steps > 0 else float("inf")
    if run.seconds is not None and run.seconds < by_steps:
        steps = run.seconds / max(step_seconds, 1e-9)
        lines += [f"the run: {_duration(run.seconds)} (trainer.max_time), about {steps:,.0f} steps"]
    elif run.max_steps > 0:
        total = f"the run: {_duration(by_steps)} for {run.max_steps:,} steps"
        hours = by_steps * run.processes / 3600
        lines += [f"{total}, {hours:,.1f} device hours; reading and validation come on top"]
    return lines


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


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h" if seconds < 360_000 else f"{seconds / 86_400:,.3g} days"
