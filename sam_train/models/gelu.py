"""GELU, whose gradient costs torch on a CPU four times what its value does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.models import compiled


def gelu(x: Tensor) -> Tensor:
    """`F.gelu`."""
    if torch.is_grad_enabled() and x.requires_grad and x.dim() and compiled.takes(x):
        return _Gelu.apply(x)
    return F.gelu(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not compiled.takes(gradient):
            return torch.ops.aten.gelu_backward(gradient, x)
        return compiled.gelu_back(gradient.contiguous(), x.contiguous())
