"""An exponential moving average of the weights, which is what is validated and kept as the best model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from torch import Tensor, nn


class WeightAverage(lightning.Callback):
    """Follows the weights: average = decay * average + (1 - decay) * weights, after each optimiser step.

    Validation, pictures and `best.ckpt` are of the average; `last.ckpt` holds both. The first steps
    count for more, min(decay, (1 + steps) / (10 + steps)), so that the start is soon forgotten.

    Batch norm's means and variances (TinyViT has them) are averaged alike: those of the latest weights are
    of other activations than the average's.

    Args:
        decay: in [0, 1); 0.999 looks back about a thousand steps.
    """

    def __init__(self, *, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is in [0, 1), got {decay}")
        self.decay = decay
        self.num_steps = 0
        self.average: list[Tensor] = []
        self._seen_step = -1
        self._is_in_place = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        weights = _weights(pl_module)
        if not self.average:
            self.average = [weight.clone() for weight in weights]
        self.average = [a.to(w.device) for a, w in zip(self.average, weights, strict=True)]
        self._seen_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        self.num_steps += 1
        decay = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        torch._foreach_lerp_(self.average, _weights(pl_module), 1 - decay)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and not self._is_in_place:
            self._swap(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and self._is_in_place:
            self._swap(pl_module)

    @contextmanager
    def in_place(self, pl_module: Any) -> Iterator[None]:
        """The model with the averaged weights, for as long as this lasts."""
        swaps = bool(self.average) and not self._is_in_place
        if swaps:
            self._swap(pl_module)
        try:
            yield
        finally:
            if swaps:
                self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: Any) -> None:
        for weight, average in zip(_weights(pl_module), self.average, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self._is_in_place = not self._is_in_place

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_steps, self.average = state_dict["num_steps"], state_dict["average"]


def _weights(pl_module: Any) -> list[Tensor]:
    """What is averaged: the parameters, and the running statistics of batch norms."""
    parameters = [parameter.detach() for parameter in pl_module.model.parameters()]
    norms = (m for m in pl_module.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var)]
    return parameters + [s for s in statistics if s is not None]
