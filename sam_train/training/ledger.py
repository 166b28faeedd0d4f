"""Counts what a computation costs, operation by operation: memory alive, arithmetic, memory traffic.

Made to run around fake tensors, which have shapes and no numbers: a step of ViT-H at 1024 px is counted
in seconds and needs no memory. Real tensors beside the fake ones keep their numbers, and what is made of
them alone is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary


class Operation(NamedTuple):
    """One operation.

    Attributes:
        part: whose it is.
        flops: of multiplications and additions, as `torch.utils.flop_counter` counts them.
        moved: bytes read and written.
    """

    part: str
    flops: int
    moved: int


class Ledger(TorchDispatchMode):
    """While entered, notes down every operation and every tensor that comes and goes.

    Attributes:
        operations: in order.
        alive: bytes of tensors that are still held, by the part that made them.
        peak: the most bytes alive at once.
        at_peak: `alive` at that moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.alive: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: Mapping[str, int] = {}
        self._total = 0
        self._part = "other"
        self._known: Any = WeakIdKeyDictionary()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Does not count the memory of tensors that were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = True

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
        if inputs and _is_fake_mode_on() and not any(isinstance(i, FakeTensor) for i in inputs):
            with unset_fake_temporarily():  # which image a prompt belongs to decides on shapes
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _any_number(args[0])
        result = func(*args, **kwargs)
        outputs = [item for item in tree_iter(result) if isinstance(item, Tensor)]
        is_new = [self._note(output) for output in outputs]
        if any(is_new) or func._schema.is_mutable:
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count is not None else 0
            moved = sum(map(_num_bytes, (*inputs, *outputs)))
            self.operations.append(Operation(self._part, int(flops), moved))
        return result

    def _note(self, tensor: Tensor) -> bool:
        """Takes in a tensor's memory; False for one that shares it with an earlier one."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known[storage] = True
        num_bytes, part = storage.nbytes(), self._part
        self.alive[part] += num_bytes
        self._total += num_bytes
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, dict(self.alive)
        weakref.finalize(storage, self._forget, part, num_bytes)
        return True

    def _forget(self, part: str, num_bytes: int) -> None:
        self.alive[part] -= num_bytes
        self._total -= num_bytes


def _is_fake_mode_on() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _any_number(tensor: Tensor) -> bool | int | float:
    """A value where there are only shapes; optimisers ask for their count of steps."""
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
