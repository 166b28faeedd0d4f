"""Matrix products on the CPU by the quicker of two libraries that torch has along: MKL or oneDNN.

torch gives products in float32 to MKL. On an AMD EPYC with AVX-512, MKL's kernels reached 97 GFLOP/s a core
where oneDNN's reached 230. On an Intel Xeon (Sapphire Rapids) both reach 130 to 170, and MKL takes batches
where oneDNN takes one product after the other (150 against 70): there all is left to MKL. Both are plain
float32 arithmetic; only the order of the sums differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_PRODUCTS = 1 << 20
"""Multiplications of a product from which on a better kernel pays for the longer way to it."""
MIN_IN_BATCH = 1 << 21
"""The same in a batch, whose products are then done one by one and put together."""
LONGEST_SUM = 4096
"""Gradients of weights that are sums over more rows are MKL's: oneDNN's kernels are made for short ones."""

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _is_intel() -> bool:
    """Whether the processor is one that MKL is made for; the same answer in every process of a machine."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


PREFERS_MKL = _is_intel()


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
    if is_small or torch.is_grad_enabled() or not is_on_cpu_now(x):
        return F.gelu(linear(x, weight, bias))
    if not _takes(x, weight):
        # In its place: fresh memory of this size is paid for in page faults.
        return torch.ops.aten.gelu_(F.linear(x, weight, bias))
    assert _ONEDNN is not None
    return _ONEDNN(_packed(x), _packed(weight), bias, "gelu", [], "none")


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm` of (P, M, K) and (P, K, N), any strides welcome."""
    if not len(a) or a[0].numel() * b.shape[2] < _least(a) or not _takes(a, b):
        return torch.bmm(a, b)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Bmm.apply(a, b)
    return products(a, b)


def _least(a: Tensor) -> int:
    return MIN_PRODUCTS if len(a) == 1 else MIN_IN_BATCH


def products(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.bmm` without gradients, by the quicker library; for what `is_plain_cpu` says yes to.

    oneDNN takes single products alone.
    """
    if a[0].numel() * b.shape[2] < _least(a) or not _takes(a, b):
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    if len(a) == 1 and out is None:
        return product(a[0], b[0].mT)[None]
    out = a.new_empty(len(a), a.shape[1], b.shape[2]) if out is None else out
    for into, one, other in zip(out, a, b, strict=True):
        into.copy_(product(one, other.mT))
    return out


def add_products(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.baddbmm` without gradients, by the quicker library; for what `is_plain_cpu` says yes to."""
    # MKL takes longer to add to what is there than it takes to add it afterwards.
    return products(a, b).add_(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN, without gradients; for what `takes_products` says yes to."""
    assert _ONEDNN is not None
    return _ONEDNN(_packed(x), _packed(weight), bias, "none", [], "")


def _packed(x: Tensor) -> Tensor:
    """oneDNN multiplies rows that lie further apart than they are long a hundred times more slowly."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def runs_now() -> bool:
    """Whether tensors are numbers here: no compiler, tracer or transform (`torch.func`) stands between."""
    return (
        # Asked first: the others are no part of a compiler's graph.
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def is_plain_cpu(x: Tensor) -> bool:
    """Whether such tensors are numbers in the memory of this machine, here and now, in full precision."""
    return (
        is_on_cpu_now(x)
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )


def is_on_cpu_now(x: Tensor) -> bool:
    """The same in any precision.

    A compiler has its own choice of kernels, an exported graph no loops, a transform no rule for them.
    """
    return (
        runs_now()
        and type(x)
        in (Tensor, nn.Parameter)  # fake tensors and other subclasses have their own ways
        and x.device.type == "cpu"
    )


def takes_products(x: Tensor) -> bool:
    """Whether `product` is for such tensors, here and now."""
    return (
        is_plain_cpu(x)
        and not PREFERS_MKL
        and _ONEDNN is not None
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def _takes(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and takes_products(x)


class _Linear(torch.autograd.Function):
    # Gradients are products too, which have gradients themselves.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            linear(gradient, weight.mT) if of_x else None,
            weight_gradient(rows, x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """(O, I) from (M, O) and (M, I)."""
    num_products = gradient.numel() * x.shape[1]
    if (
        len(x) > LONGEST_SUM
        or num_products < MIN_PRODUCTS
        or min(*x.shape, gradient.shape[1]) < 128
    ):
        return gradient.mT @ x
    return linear(gradient.mT, x.mT)


class _Bmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return products(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return (
            bmm(gradient, b.mT) if of_a else None,
            bmm(a.mT, gradient) if of_b else None,
        )
