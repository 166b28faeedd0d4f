"""Loops that pass once over what torch's kernels pass over several times, compiled by Numba, on the CPU.

Between matrix products, a softmax with biases or a GELU with its norm costs torch a pass over the memory for
each of its steps. Where Numba is installed (`sam-train[cpu]`), one pass does them all, a row in the cache at
a time; elsewhere torch's kernels do, to the same answer but for rounding.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sam_train.models.products import is_on_cpu_now, is_plain_cpu

MIN_OF_SLICE = 1 << 15
"""Numbers from which on another thread pays."""
MAX_MASKS = 4
"""Masks that a loop makes of a prompt's features at a time."""


def takes(*tensors: Tensor) -> bool:
    """Whether the loops are for such tensors, here and now: plain float32 on the CPU, and Numba at hand."""
    return (
        all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        and is_plain_cpu(tensors[0])
        and _are_at_hand()
    )


def takes_bf16(*tensors: Tensor) -> bool:
    """Whether `soften` and its gradient, which take bfloat16 too, are for such tensors of it, here and now."""
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)
        and is_on_cpu_now(tensors[0])
        and _are_at_hand()
    )


def _are_at_hand() -> bool:
    # What looks on, such as `make_fx`, would take what the loops write for constants.
    return not torch._C._len_torch_dispatch_stack() and _loops() is not None


@cache
def _loops() -> Any:
    """The module of loops; None without Numba, and where it is not to compile."""
    if find_spec("numba") is None or os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return None
    try:
        loops = import_module("sam_train.models.compiled_loops")
    except Exception as error:  # such as a NumPy that Numba does not know yet, of many types
        warnings.warn(f"Numba is installed, but does not load: {error!r}", stacklevel=2)
        return None
    return None if loops.numba.config.DISABLE_JIT else loops


def _call(name: str, *args: Any) -> None:
    """A loop, by its name."""
    loops = _loops()
    try:
        getattr(loops, name)(*args)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        warnings.warn(f"compiled loops are not kept for the next process: {error!r}", stacklevel=2)
        loops.forget_cache()
        getattr(loops, name)(*args)


def _check(*lengths: int) -> None:
    """The loops look at no bounds."""
    if len(set(lengths)) > 1:
        raise ValueError(f"expected as many channels of all, got {lengths}")


@cache
def _openmp() -> Any:
    """GNU's OpenMP library, that which came with torch before any other; None where there is none, or several."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.splitlines() if "libgomp" in line}
    of_torch = [path for path in paths if Path(torch.__file__).parent in Path(path).parents]
    paths = set(of_torch) or paths
    if len(paths) != 1:
        return None
    library = ctypes.CDLL(paths.pop())
    return library if hasattr(library, "GOMP_parallel") else None


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _in_slices(work: Callable[[int, int], None], length: int, numbers_each: int) -> None:
    """Calls work(start, stop) for slices that make up the length, on torch's own threads.

    Others would wait for these, which spin for milliseconds after every product.
    """
    num = min(torch.get_num_threads(), length, length * numbers_each // MIN_OF_SLICE)
    library = _openmp() if num > 1 else None
    if library is None:
        return work(0, length)
    slices = [(length * i // num, length * (i + 1) // num) for i in range(num)]
    errors: list[BaseException] = []

    finished: set[int] = set()

    def take_slices(_: int | None = None) -> None:
        # However many threads there are: `pop` gives every slice once.
        try:
            while slices:
                try:
                    some = slices.pop()
                except IndexError:  # another thread was first
                    break
                work(*some)
        except BaseException as error:
            errors.append(error)
        finished.add(threading.get_ident())

    library.GOMP_parallel(_CALLBACK(take_slices), None, ctypes.c_uint(num), ctypes.c_uint(0))
    if threading.get_ident() not in finished:
        # ctypes drops what a signal's handler raises before the function's first line.
        errors.append(KeyboardInterrupt())
    if errors:
        raise errors[0]


def _arrays(*tensors: Tensor) -> list[Any]:
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError("the loops are for contiguous tensors")
    # NumPy has no bfloat16: its bits.
    return [
        (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).detach().numpy() for x in tensors
    ]


def soften(
    scores: Tensor, along: Tensor, window: tuple[int, int], width: int, first_row: int
) -> Tensor:
    """Weights of the keys, in the place of their scores, but for what each query's are to be multiplied by.

    Args:
        scores: (heads, queries, h * w), of queries with the keys of a window (h, w); float32 or bfloat16.
        along: (heads, queries, 2h - 1 + 2w - 1), biases by key's row minus query's, then by columns; of the
            same precision.
        width: queries lie in rows of so many,
        first_row: the first of them in this row of the window.

    Returns:
        (heads, queries, 1) in float32, one by the sum of a query's weights.
    """
    num_queries = scores.shape[1]
    inverse_sums = scores.new_empty(*scores.shape[:2], 1, dtype=torch.float32)
    grids, biases, inverse = _arrays(
        scores.view(-1, *window), along.view(-1, along.shape[-1]), inverse_sums.view(-1)
    )

    def work(start: int, stop: int) -> None:
        _call(
            "soften",
            grids[start:stop],
            biases[start:stop],
            inverse[start:stop],
            start,
            num_queries,
            width,
            first_row,
        )

    _in_slices(work, len(grids), window[0] * window[1])
    return inverse_sums


def soften_back(
    errors: Tensor,
    shares: Tensor,
    inverse_sums: Tensor,
    window: tuple[int, int],
    width: int,
    first_row: int,
) -> Tensor:
    """The gradients of `soften`'s scores, in the place of those of the weights that sum to one.

    Args:
        errors: (heads, queries, h * w), of the precision of the shares.
        shares, inverse_sums: what `soften` gave.

    Returns:
        (heads, queries, 2h - 1 + 2w - 1) in float32, the gradient of `along`.
    """
    num_queries = errors.shape[1]
    of_along = errors.new_zeros(*errors.shape[:2], 2 * sum(window) - 2, dtype=torch.float32)
    arrays = _arrays(
        errors.view(-1, *window),
        shares.view(-1, *window),
        inverse_sums.view(-1),
        of_along.view(-1, of_along.shape[-1]),
    )

    def work(start: int, stop: int) -> None:
        slices = [x[start:stop] for x in arrays]
        _call("soften_back", *slices, start, num_queries, width, first_row)

    _in_slices(work, len(arrays[0]), window[0] * window[1])
    return of_along


class NormGelu(NamedTuple):
    """A bias, a layer norm over the last axis and a GELU.

    Attributes:
        bias, gain, shift: (C,).
        eps: of the norm.
    """

    bias: Tensor
    gain: Tensor
    shift: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(P, L, C) to (P, L, C)."""
        out = torch.empty_like(x)
        self._run("norm_gelu", [x], [out])
        return out

    def back(self, gradient: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The gradients of x, bias, gain and shift by that of the result."""
        of_x = torch.empty_like(x)
        of_vectors = [x.new_zeros(len(x), x.shape[2]) for _ in range(3)]
        self._run("norm_gelu_back", [gradient, x], [of_x, *of_vectors])
        return of_x, *(of_vector.sum(dim=0) for of_vector in of_vectors)

    def _run(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        bias, gain, shift, eps = self
        _check(inputs[0].shape[2], len(bias), len(gain), len(shift))
        _over_prompts(name, [*inputs, *outputs], [bias, gain, shift], np.float32(eps))


def gelu_masks(x: Tensor, bias: Tensor, filters: Tensor, places: Tensor) -> Tensor:
    """Products of filters with the GELU of x + bias.

    Args:
        x: (P, L, C).
        bias: (C,).
        filters: (P, M, C), M at most `MAX_MASKS`.
        places: (L,) int64, where a row's product is put: 0 to L - 1, each once.

    Returns:
        (P, M, L).
    """
    _check(x.shape[2], len(bias), filters.shape[2])
    _check(x.shape[1], len(places))
    num_masks, padded = filters.shape[1], _padded(filters)
    out = x.new_empty(*padded.shape[:2], x.shape[1])
    _over_prompts("gelu_mask" if num_masks == 1 else "gelu_masks", [x, padded, out], [bias, places])
    return out[:, :num_masks]


def gelu_masks_back(
    gradient: Tensor, x: Tensor, bias: Tensor, filters: Tensor, places: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, bias and filters by that, (P, M, L), of the result."""
    _check(x.shape[2], len(bias), filters.shape[2])
    _check(x.shape[1], len(places), gradient.shape[2])
    num_masks, padded = filters.shape[1], _padded(filters)
    of_x, of_bias = torch.empty_like(x), x.new_zeros(len(x), x.shape[2])
    of_filters = torch.zeros_like(padded)
    name = "gelu_mask_back" if num_masks == 1 else "gelu_masks_back"
    inputs = [_padded(gradient), x, padded]
    _over_prompts(name, [*inputs, of_x, of_bias, of_filters], [bias, places])
    return of_x, of_bias.sum(dim=0), of_filters[:, :num_masks]


def _padded(x: Tensor) -> Tensor:
    """(P, M, ...) with M one, or made as many as the loops for several take at once."""
    num_masks = x.shape[1]
    if num_masks == 1:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(len(x), MAX_MASKS - num_masks, x.shape[2])], dim=1)


def _over_prompts(name: str, of_prompts: list[Tensor], shared: list[Tensor], *others: Any) -> None:
    arrays, rest = _arrays(*of_prompts), _arrays(*shared)
    _check(*(len(x) for x in arrays))

    def work(start: int, stop: int) -> None:
        _call(name, *(x[start:stop] for x in arrays), *rest, *others)

    _in_slices(work, len(arrays[0]), of_prompts[0][:1].numel())


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of (R, C) with a bias (C,), in its place."""
    _check(x.shape[1], len(bias))
    _over_prompts("bias_gelu", [x], [bias])
    return x


def gelu_back(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of a GELU of x, (..., C), by that of its result."""
    of_x = torch.empty_like(x)
    rows = [tensor.view(-1, x.shape[-1]) for tensor in (gradient, x, of_x)]
    _over_prompts("gelu_back", rows, [])
    return of_x


def softmax_of_tokens(scores: Tensor, bias: Tensor) -> Tensor:
    """Of scores (P, T, H, L) and biases (P, T, H), over the T tokens: in the scores' place."""
    _over_prompts("softmax_of_tokens", [scores, bias], [])
    return scores


def softmax_of_tokens_back(errors: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the shares to those of the scores, in their place, and of the biases."""
    of_bias = errors.new_empty(errors.shape[:3])
    _over_prompts("softmax_of_tokens_back", [errors, shares, of_bias], [])
    return errors, of_bias


def pixel_sums(logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """The sums over L of probability, probability x target, cross-entropy, and focal loss of gamma 2.

    Args:
        logits: (P, M, L).
        targets: (P, L) in [0, 1].
        alpha: the focal loss's weight of the foreground.

    Returns:
        (P, M, 4).
    """
    sums = logits.new_empty(*logits.shape[:2], 4)
    _over_prompts("pixel_sums", [logits, targets, sums], [], np.float32(alpha))
    return sums


def pixel_sums_back(pulls: Tensor, logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """The gradient of the logits by that of `pixel_sums`."""
    of_logits = torch.empty_like(logits)
    _over_prompts("pixel_sums_back", [logits, targets, pulls, of_logits], [], np.float32(alpha))
    return of_logits
