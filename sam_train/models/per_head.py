"""Products head by head, from and to rows whose heads lie between one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_train.models.products import is_plain_cpu


def per_head(rows: Tensor, matrices: Tensor) -> Tensor:
    """Every head's rows by its matrix.

    Args:
        rows: (P, T, H, a), P prompts in N runs of equal length.
        matrices: (N, H, a, b), a run's.

    Returns:
        (P, T, H, b).
    """
    if is_plain_cpu(rows):
        return _PerHead.apply(rows, matrices)
    if len(matrices) == 1:
        return torch.einsum("ptha,hab->pthb", rows, matrices[0])
    runs = rows.unflatten(0, (len(matrices), -1)).flatten(1, 2)
    out = torch.einsum("nqha,nhab->nqhb", runs, matrices)
    return out.flatten(0, 1).unflatten(0, rows.shape[:2])


def _by_run(rows: Tensor, num_runs: int) -> Tensor:
    """(P, T, H, a) to (N, H, rows of a run, a), a view where the rows are contiguous."""
    return rows.unflatten(0, (num_runs, -1)).flatten(1, 2).transpose(1, 2)


class _PerHead(torch.autograd.Function):
    # As einsum does it, every product would be followed by a copy into the order of the rows.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices)
        out = rows.new_empty(*rows.shape[:3], matrices.shape[3])
        runs = zip(_by_run(out, len(matrices)), _by_run(rows, len(matrices)), matrices, strict=True)
        for into, own, matrix in runs:
            torch.bmm(own, matrix, out=into)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # Of products too, which have gradients themselves.
        rows, matrices = ctx.saved_tensors
        of_rows, of_matrices = ctx.needs_input_grad
        by_run, pulls = (_by_run(x, len(matrices)) for x in (rows, gradient))
        return (
            per_head(gradient, matrices.mT) if of_rows else None,
            torch.stack([own.mT @ pull for own, pull in zip(by_run, pulls, strict=True)])
            if of_matrices
            else None,
        )
