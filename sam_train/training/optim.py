"""AdamW with layer-wise decay, and how the learning rate goes over a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from sam_train.models.image_encoder import SamVitEncoder, TinyVitEncoder
from sam_train.models.sam import Sam

POSITIONS = ("pos_embed", "rel_pos", "relative_position", "attention_biases")
"""Parts of the names of positions, absolute and relative, which keep no weight decay."""


class Schedule(Protocol):
    """The learning rate as a share of its highest value."""

    def scale(self, step: int, progress: float) -> float:
        """Says the share for the step after `step` others, at `progress` in [0, 1] of the run."""


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """Linear warm-up, then a drop at each milestone (SAM: 250 steps, then x 0.1 twice).

    Attributes:
        warmup_steps: steps from nothing to the full rate.
        milestones: steps after which the rate drops.
        gamma: factor of each drop.
    """

    warmup_steps: int = 250
    milestones: Sequence[int] = (60_000, 86_666)
    gamma: float = 0.1

    def scale(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warmup * self.gamma ** sum(step >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to `final` at the end of the run.

    The end is `max_steps`, or `max_time` where that comes first, so a run of so many minutes ends
    with a low rate on a slow machine too.

    Attributes:
        warmup_steps: steps from nothing to the full rate.
        final: share of the rate at the end.
    """

    warmup_steps: int = 250
    final: float = 0.0

    def scale(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return warmup * (self.final + (1 - self.final) * cosine)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Builds AdamW for a model; layers nearer to the pixels may learn more slowly.

    Attributes:
        lr: highest learning rate, of everything but the encoder's decayed layers.
        schedule: the rate over the run.
        betas: of the running averages.
        weight_decay: of weights of two dimensions or more; not of biases, norms and positions.
        layer_decay: the rate of encoder layer i of n is lr * layer_decay ** (n + 1 - i); needs an
            encoder with numbered layers (SAM's ViT or TinyViT).
    """

    lr: float
    schedule: Schedule
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"expected lr > 0 and weight_decay >= 0, got {self.lr} and {self.weight_decay}"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is above 0 and at most 1, got {self.layer_decay}")

    def build(self, model: Sam) -> torch.optim.AdamW:
        """Groups the trainable parameters by rate and decay; frozen ones are left out."""
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            lr = self.lr * self.layer_decay ** layers_above(model, name, self.layer_decay)
            is_bare = parameter.ndim <= 1 or any(part in name for part in POSITIONS)
            decay = 0.0 if is_bare else self.weight_decay
            group = groups.setdefault((lr, decay), {"lr": lr, "weight_decay": decay, "params": []})
            group["params"].append(parameter)
        if not groups:
            raise ValueError("nothing is left to train: every parameter of the model is frozen")
        return torch.optim.AdamW(
            list(groups.values()), lr=self.lr, betas=(self.betas[0], self.betas[1])
        )


def layers_above(model: Sam, name: str, layer_decay: float) -> int:
    """How many layers lie between a parameter and the encoder's output; 0 outside the encoder."""
    prefix = "image_encoder.backbone."
    if layer_decay == 1.0 or not name.startswith(prefix):
        return 0
    layers, pattern = _numbered_layers(model.image_encoder)
    path = name.removeprefix(prefix)
    if found := re.match(pattern, path):
        return len(layers) - layers.index(found[0])
    return 0 if path.startswith("neck.") else len(layers) + 1


def _numbered_layers(encoder: nn.Module) -> tuple[list[str], str]:
    """The names of an encoder's blocks from the pixels up, and a pattern that finds them."""
    if isinstance(encoder, SamVitEncoder):
        return [f"blocks.{i}." for i in range(len(encoder.backbone.blocks))], r"blocks\.\d+\."
    if isinstance(encoder, TinyVitEncoder):
        return [f"stages.{i}." for i in range(len(encoder.backbone.stages))], r"stages\.\d+\."
    raise ValueError(
        "layer_decay needs an encoder with numbered layers (SamVitEncoder, TinyVitEncoder), "
        f"got {type(encoder).__name__}; set optim.layer_decay=1"
    )


def parameter_table(model: nn.Module) -> str:
    """Parameters by part, trainable and frozen, as lines of text."""
    rows = [(name, *_count(part.parameters())) for name, part in model.named_children()]
    rows.append(("all", *_count(model.parameters())))
    lines = [f"{'part':<16}{'trainable':>14}{'frozen':>14}"]
    lines += [f"{name:<16}{trainable:>14,}{frozen:>14,}" for name, trainable, frozen in rows]
    return "\n".join(lines)


def _count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    trainable = frozen = 0
    for parameter in parameters:
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            frozen += parameter.numel()
    return trainable, frozen
