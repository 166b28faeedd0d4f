"""What a training will cost, told before it is started: memory by part, time of a step and of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sam_train.models.sam import Sam
from sam_train.training.bounded import ADVICE
from sam_train.training.distillation import Distillation
from sam_train.training.interactive import InteractiveTraining
from sam_train.training.machine_speed import Speed
from sam_train.training.optim import parameter_table
from sam_train.training.step_cost import Memory, Phase, Run, StepCost, phases, step_cost

GIB = 2**30
OVERHEAD = 1.5
"""What a process holds over its tensors at most (docs/estimate.md)."""


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
        return OVERHEAD * _heaviest(_costs(module, larger))[1].memory.peak

    one, two = peak(1), peak(2)
    if one > free_bytes:
        raise ValueError(
            f"data.batch_size=auto: a single image takes {_gib(one)}, {_gib(free_bytes)} are free.\n{ADVICE}"
        )
    return 1 + int((free_bytes - one) / max(two - one, 1.0))


def _costs(module: InteractiveTraining, run: Run) -> list[tuple[Phase, StepCost]]:
    """Those of each stretch of a run."""
    return [(phase, step_cost(module, run, phase)) for phase in phases(module, run)]


def _heaviest(costs: Sequence[tuple[Phase, StepCost]]) -> tuple[Phase, StepCost]:
    """The stretch that needs the most memory."""
    return max(costs, key=lambda cost: cost[1].memory.peak)


def is_checkpointed(model: Sam) -> bool:
    """Whether the image encoder recomputes its blocks."""
    modules = model.image_encoder.modules()
    return any(getattr(module, "grad_checkpointing", False) for module in modules)


def can_checkpoint(model: Sam) -> bool:
    """Whether the image encoder is trained and knows how to recompute its blocks."""
    encoder: Any = model.image_encoder
    is_trained = any(parameter.requires_grad for parameter in encoder.parameters())
    return is_trained and hasattr(getattr(encoder, "backbone", None), "set_grad_checkpointing")


def report(module: InteractiveTraining, run: Run, speed: Speed, machine: str) -> str:
    """The estimate as text.

    Args:
        module: on the meta device.
        run: what is asked for.
        speed: of the machine, measured or stated.
        machine: what the speed is of.
    """
    costs = _costs(module, run)
    heaviest, its_cost = _heaviest(costs)
    lines = ["parameters", parameter_table(module.model), *_teacher_lines(module), ""]
    lines += [f"memory of one process, {run.batch_size} images with {run.num_masks} masks in all"]
    lines += _memory_lines(its_cost.memory)
    if can_checkpoint(module.model):
        on = not is_checkpointed(module.model)
        other = step_cost(module, run, heaviest, grad_checkpointing=on)
        lines += [
            f"model.image_encoder.grad_checkpointing={str(on).lower()}: a peak of "
            f"{_gib(other.memory.peak)}, {_duration(speed.seconds(other.operations))} a batch"
        ]
    lines += ["", f"time on {machine}: {speed.flops / 1e12:.3g} TFLOP/s"]
    mean = 0.0
    for phase, cost in costs:
        seconds = speed.seconds(cost.operations)
        mean += phase.share * seconds
        tflops = sum(op.flops for op in cost.operations) / 1e12
        lines += [
            f"{phase.share:.0%} of the run at {phase.img_size} px, {_work(phase)}: {tflops:.3g} TFLOP, "
            f"{_duration(seconds)} a batch"
        ]
    lines += _run_lines(run, mean * run.accumulate)
    return "\n".join(lines)


def _work(phase: Phase) -> str:
    alone = "guesses alone" if phase.num_guessed else "embeddings alone"
    played = f"{phase.num_played} masks played" if phase.num_played else alone
    return played if phase.asks_teacher else f"{played}, the truth alone"


def _teacher_lines(module: InteractiveTraining) -> Iterator[str]:
    if isinstance(module, Distillation):
        count = sum(parameter.numel() for parameter in module.teacher.model.parameters())
        from_cache = ", its embeddings from the cache" if module.teacher.reads_cache else ""
        yield f"teacher: {count / 1e6:,.2f} M, asked and not trained{from_cache}"


def _memory_lines(memory: Memory) -> Iterator[str]:
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser state": memory.optimiser,
        **({"teacher's weights": memory.teacher} if memory.teacher else {}),
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


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h" if seconds < 360_000 else f"{seconds / 86_400:,.3g} days"
