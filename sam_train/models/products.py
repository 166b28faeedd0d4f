"""Matrix products on the CPU through oneDNN, which torch has along and by itself leaves to half precision.

torch gives products in float32 to MKL. On an AMD EPYC with AVX-512, MKL's kernels reached 97 GFLOP/s a core
where oneDNN's reached 230; no Intel processor has been tried. Both are plain float32 arithmetic; only the
order of the sums differs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_PRODUCTS = 1 << 20
"""Multiplications of a product from which on a better kernel pays for the longer way to it."""
MIN_IN_BATCH = 1 << 21
"""The same in a batch, whose products are then done one by one and put together."""
LONGEST_SUM = 4096
"""Gradients of weights that are sums over more rows are MKL's: oneDNN's kernels are made for short ones."""

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


LINEAR = (Linear, nn.Linear)
"""The linear layers whose weights say all that they do."""


def use_fast_linears(module: nn.Module) -> None:
    """Turns the linear layers of a model that was built elsewhere into `Linear`s; weights stay."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, any strides welcome: (..., I) by (O, I)."""
    if x.numel() * weight.shape[0] < MIN_PRODUCTS or not _takes(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.gelu(linear(...))`; where no gradient is wanted, the sums pass the GELU while in the cache."""
    is_small = x.numel() * weight.shape[0] < MIN_PRODUCTS
    if is_small or torch.is_grad_enabled() or not _takes(x, weight):
        return F.gelu(linear(x, weight, bias))
    assert _ONEDNN is not None
    return _ONEDNN(_packed(x), _packed(weight), bias, "gelu", [], "none")


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm` of (P, M, K) and (P, K, N), any strides welcome."""
    least = MIN_PRODUCTS if len(a) == 1 else MIN_IN_BATCH
    if a[0].numel() * b.shape[2] < least or not _takes(a, b):
        return torch.bmm(a, b)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Bmm.apply(a, b)
    return products(a, b)


def products(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm` by oneDNN, which takes single products alone; otherwise as `product`."""
    if len(a) == 1:
        return product(a[0], b[0].mT)[None]
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    for into, one, other in zip(out, a, b, strict=True):
        into.copy_(product(one, other.mT))
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN, without gradients; for what `takes_products` says yes to."""
    assert _ONEDNN is not None
    return _ONEDNN(_packed(x), _packed(weight), bias, "none", [], "")


def _packed(x: Tensor) -> Tensor:
    """oneDNN multiplies rows that lie further apart than they are long a hundred times more slowly."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def takes_products(x: Tensor) -> bool:
    """Whether `product` is for such tensors, here and now."""
    return (
        # A compiler has its own choice of kernels, and an exported graph no oneDNN.
        not torch.compiler.is_compiling()
        and _ONEDNN is not None
        and type(x)
        in (Tensor, nn.Parameter)  # fake tensors and other subclasses have their own ways
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._is_tracing()
    )


def _takes(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and takes_products(x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            product(gradient, weight.mT) if of_x else None,
            _of_weight(rows, x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def _of_weight(gradient: Tensor, x: Tensor) -> Tensor:
    """(O, I) from (M, O) and (M, I)."""
    num_products = gradient.numel() * x.shape[1]
    if (
        len(x) > LONGEST_SUM
        or num_products < MIN_PRODUCTS
        or min(*x.shape, gradient.shape[1]) < 128
    ):
        return gradient.mT @ x
    return product(gradient.mT, x.mT)


class _Bmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return products(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return (
            products(gradient, b.mT) if of_a else None,
            products(a.mT, gradient) if of_b else None,
        )
