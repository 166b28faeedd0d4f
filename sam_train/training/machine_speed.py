"""How fast a machine is, measured, and how long it takes over counted operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sam_train.training.ledger import Operation


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
        moved=3 * large.nbytes / _seconds(lambda: torch.add(large, large), device, clock),
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
