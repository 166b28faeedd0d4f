"""What the commands' jobs share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sam_train import allocator

FULL = "32-true"
PRECISIONS = (FULL, "bf16-mixed", "16-mixed")
"""Lightning's names, as of `trainer.precision`."""


def prepare_host(*, runs_long: bool = False) -> None:
    """Settles how this process treats memory, before its first large tensor."""
    import torch

    if not torch.cuda.is_available():
        allocator.keep_freed_memory(huge_pages=runs_long)


def device(name: str) -> str:
    """The device that `device=` names; auto is the first GPU, or the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected device=cpu, cuda, cuda:1 or auto, got {name}: {reason}"
        ) from None
    return name


def precision(name: str, device: str) -> AbstractContextManager[object]:
    """What a model is asked within, so that products are taken in the precision that `precision=` names.

    Raises:
        ValueError: there is no such precision.
    """
    import torch

    if name not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {name}")
    if name == FULL:
        return nullcontext()
    dtype = torch.bfloat16 if name.startswith("bf16") else torch.float16
    return torch.autocast(torch.device(device).type, dtype)


def print_result(result: Any) -> None:
    """Prints the metrics of what a run's or an evaluation's `metrics.json` holds."""
    for name, value in sorted(result.get("metrics", {}).items()):
        print(f"{name:>28}  {value:.4g}" if isinstance(value, float) else f"{name:>28}  {value}")
