"""AdamW with layer-wise decay, and how the learning rate goes over a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.optim.muon import Muon as TimmMuon
from torch import nn

from sam_train.models.image_encoder import SamVitEncoder, TimmEncoder, TinyVitEncoder
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
            encoder with numbered layers: a ViT's blocks, or stages.
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

    def build(self, model: Sam) -> torch.optim.Optimizer:
        """Groups the trainable parameters by rate and decay; frozen ones are left out."""
        groups = parameter_groups(
            model, lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay
        )
        betas = self.betas[0], self.betas[1]
        options = [group.options() for group in groups]
        optimizer = torch.optim.AdamW(options, lr=self.lr, betas=betas, fused=True)
        # A fused optimizer may unscale gradients itself, and is therefore not clipped by Lightning under
        # mixed precision. Here the scaler does it before, as for any other. Its kernel on the CPU goes by
        # memory: a gradient must lie as its parameter does, as autograd's own do.
        optimizer._step_supports_amp_scaling = False
        return optimizer


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """AdamW, but for the weights between features: those take orthogonalised steps (Jordan 2024).

    A step moves all directions of such a matrix alike, however small the gradient along one is. From
    random weights and over few steps this learns much faster. Convolutions count as matrices of their
    output channels. Embeddings, positions, norms and biases stay with AdamW, at `lr`.

    Attributes:
        matrix_lr_scale: rate of the matrices, in `lr`. Their steps have the root mean square that is
            usual for AdamW (Liu et al. 2025), so rates mean about the same.
        momentum: of the matrices' gradients.
    """

    matrix_lr_scale: float = 4.0
    momentum: float = 0.95

    def build(self, model: Sam) -> torch.optim.Optimizer:
        """Groups the trainable parameters by rule, rate and decay; frozen ones are left out."""
        matrices = {id(parameter) for parameter in matrices_between_features(model)}
        options = []
        for group in parameter_groups(
            model, lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay
        ):
            for is_matrix in (True, False):
                params = [p for p in group.params if (id(p) in matrices) == is_matrix]
                rate = self.matrix_lr_scale if is_matrix else 1.0
                if params:
                    part = ParameterGroup(rate * group.lr, group.weight_decay, params)
                    options.append({**part.options(), "use_fallback": not is_matrix})
        betas = self.betas[0], self.betas[1]
        return TimmMuon(
            options,
            lr=self.lr,
            momentum=self.momentum,
            betas=betas,
            adjust_lr_fn="match_rms_adamw",
            conv_mode="flatten",
        )


def matrices_between_features(model: Sam) -> Iterator[nn.Parameter]:
    """The weights of linear layers and convolutions: what maps features to features."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            yield from (p for name, p in module.named_parameters() if name == "weight")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at one rate and decay alike."""

    lr: float
    weight_decay: float
    params: list[nn.Parameter]

    def options(self) -> dict[str, Any]:
        return {"params": self.params, "lr": self.lr, "weight_decay": self.weight_decay}


def parameter_groups(
    model: Sam, *, lr: float, weight_decay: float, layer_decay: float
) -> list[ParameterGroup]:
    """The trainable parameters by rate and decay.

    Raises:
        ValueError: nothing is trainable, or the encoder has no layers for `layer_decay`.
    """
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * layer_decay ** layers_above(model, name, layer_decay)
        is_bare = parameter.ndim <= 1 or any(part in name for part in POSITIONS)
        decay = 0.0 if is_bare else weight_decay
        group = groups.setdefault((rate, decay), ParameterGroup(rate, decay, []))
        group.params.append(parameter)
    if not groups:
        raise ValueError("nothing is left to train: every parameter of the model is frozen")
    return list(groups.values())


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
    if isinstance(encoder, TimmEncoder) and (layers := _timm_layers(encoder.backbone)):
        return layers, "|".join(re.escape(layer) for layer in layers)
    raise ValueError(
        "layer_decay needs an encoder with numbered layers (a ViT, or a backbone of stages), "
        f"got {type(encoder).__name__}; set optim.layer_decay=1"
    )


def _timm_layers(backbone: Any) -> list[str]:
    """The blocks of a plain ViT or the stages of a pyramid, by the start of their parameters' names."""
    if hasattr(backbone, "model") and hasattr(backbone.model, "blocks"):
        return [f"model.blocks.{i}." for i in range(len(backbone.model.blocks))]
    return [f"{name}." for name, _ in backbone.named_children() if name.startswith("stages_")]


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
