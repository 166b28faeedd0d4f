"""What happens when a loss or a gradient is not finite."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ADVICE = "lower optim.lr, train in trainer.precision=32-true, or look at these images"

MOST_OVERFLOWS = 30
"""A gradient scaler halves its scale at each overflow: after these it is 2**16 / 2**30."""


@dataclass
class NonFiniteGuard:
    """Stops at, or skips, optimiser steps whose loss or gradient is infinite or not a number.

    Attributes:
        action: `stop` ends the run with an error, `skip` leaves the weights as they are and goes on.
        max_in_a_row: skipped steps without a good one between them that end the run after all.
        num_skipped: so far.
        num_in_a_row: since the last good step.
    """

    action: Literal["stop", "skip"] = "stop"
    max_in_a_row: int = 5
    num_skipped: int = field(default=0, init=False)
    num_in_a_row: int = field(default=0, init=False)
    _keys: list[str] = field(default_factory=list, init=False)
    _bad_loss: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.action not in ("stop", "skip"):
            raise ValueError(f"action is stop or skip, got {self.action!r}")
        if self.max_in_a_row < 1:
            raise ValueError(f"max_in_a_row is 1 or more, got {self.max_in_a_row}")

    def look_at_loss(
        self, loss: Tensor, keys: Iterable[str], step: int, *, alone: bool = True
    ) -> None:
        """Notes the images of a batch, and whether their loss is finite.

        Args:
            loss: of the batch.
            keys: of its images.
            step: its number, for the message.
            alone: there is no other rank, which would wait for this one's gradients.

        Raises:
            FloatingPointError: it is not, and that is to stop the run.
        """
        self._keys += keys
        if torch.isfinite(loss):
            return
        self._bad_loss = f"the loss is {loss.item()} in the batch of images {', '.join(keys)}"
        if self.action == "stop" and alone:
            raise FloatingPointError(f"{self._bad_loss}, at step {step}: {ADVICE}")

    @property
    def met_bad_loss(self) -> bool:
        """Whether a loss of this step was not finite."""
        return bool(self._bad_loss)

    def passes(
        self, parameters: Iterable[Tensor], step: int, *, scaled: bool, elsewhere: bool = False
    ) -> bool:
        """Whether the optimiser may step; if not, all gradients are gone.

        Args:
            parameters: of the model, their gradients added up over all ranks.
            step: its number, for the message.
            scaled: a gradient scaler is at work, which leaves steps out by itself and expects to: only
                `MOST_OVERFLOWS` of them in a row are too many.
            elsewhere: a loss on another rank was not finite.

        Raises:
            FloatingPointError: there is no going on.
        """
        with_grad = [parameter for parameter in parameters if parameter.grad is not None]
        is_bad = has_overflown = bool(self._bad_loss) or elsewhere
        if not is_bad and with_grad:
            norms = torch._foreach_norm([p.grad for p in with_grad if p.grad is not None])
            has_overflown = not bool(torch.isfinite(torch.stack(norms).sum()))
            is_bad = has_overflown and not scaled
        keys, bad_loss = ", ".join(self._keys), self._bad_loss
        self._keys, self._bad_loss = [], ""
        if not is_bad:
            self.num_in_a_row = self.num_in_a_row + 1 if has_overflown else 0
            if self.num_in_a_row >= MOST_OVERFLOWS:
                raise FloatingPointError(
                    f"the gradient was not finite in {self.num_in_a_row} steps in a row, whatever its "
                    f"scale, last at step {step} in the batch of images {keys}: {ADVICE}"
                )
            return True
        if elsewhere and not bad_loss:
            bad_loss = "the loss on another rank is not finite; its log names the images"
        what = bad_loss or f"the gradient is not finite in the batch of images {keys}"
        if self.action == "stop":
            raise FloatingPointError(f"{what}, at step {step}: {ADVICE}")
        self.num_skipped += 1
        self.num_in_a_row += 1
        log.warning("%s: step %d is left out, %d so far", what, step, self.num_skipped)
        if self.num_in_a_row >= self.max_in_a_row:
            raise FloatingPointError(
                f"{what}, at step {step}, the last of {self.num_in_a_row} such steps in a row "
                f"(task.non_finite.max_in_a_row): {ADVICE}"
            )
        for parameter in with_grad:
            parameter.grad = None
        return False

    def state_dict(self) -> dict[str, int]:
        """What goes on after a restart."""
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.num_skipped = state_dict["num_skipped"]
        self.num_in_a_row = state_dict["num_in_a_row"]
