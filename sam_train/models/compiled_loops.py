"""Loops over float32, and some over bfloat16, that Numba compiles; `models/compiled.py` calls them.

All in one file, as Numba keeps compiled code by the file of a function, and not by those of what it calls.

A number that is none (NaN) stays one: sums may be reordered, but nothing is assumed finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core.caching import NullCache
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic, overload

F = np.float32

EXACT = frozenset({"contract"})
"""Products and sums may be one operation."""
SUMMING = frozenset({"contract", "reassoc", "nsz"})
"""Sums may be taken in another order too, hence in vectors."""


def compiled(fastmath: frozenset[str]) -> Callable[[Callable[..., Any]], Any]:
    """Compiled at the first call, and kept on disk for the next process where there is a place to."""

    def decorate(function: Callable[..., Any]) -> Any:
        settings: Any = {"fastmath": set(fastmath), "nogil": True, "error_model": "numpy"}
        njit: Any = numba.njit
        try:
            return njit(cache=True, **settings)(function)
        except RuntimeError:  # no folder that can be written
            return njit(**settings)(function)

    return decorate


def _bits(typing_context: Any, x: Any) -> Any:
    """A float32's bits as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return numba.types.int32(numba.types.float32), generate


def _from_bits(typing_context: Any, x: Any) -> Any:
    """The float32 of an int32's bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return numba.types.float32(numba.types.int32), generate


def _widened(typing_context: Any, x: Any) -> Any:
    """The float32 that a bfloat16's bits are the upper half of."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.IntType(32)
        upper = builder.shl(builder.zext(args[0], whole), ir.Constant(whole, 16))
        return builder.bitcast(upper, ir.FloatType())

    return numba.types.float32(numba.types.int16), generate


def _narrowed(typing_context: Any, x: Any) -> Any:
    """The bits of the nearest bfloat16, of two the even one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.IntType(32)
        exact = builder.bitcast(args[0], whole)
        is_odd = builder.and_(builder.lshr(exact, ir.Constant(whole, 16)), ir.Constant(whole, 1))
        rounded = builder.add(builder.add(exact, ir.Constant(whole, 0x7FFF)), is_odd)
        # Of what is no number, the sum may look like one.
        is_none = builder.fcmp_unordered("uno", args[0], args[0])
        rounded = builder.select(is_none, ir.Constant(whole, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(whole, 16)), ir.IntType(16))

    return numba.types.int16(numba.types.float32), generate


bits: Any = intrinsic(_bits)
from_bits: Any = intrinsic(_from_bits)
widened: Any = intrinsic(_widened)
narrowed: Any = intrinsic(_narrowed)

LOG2_E = F(math.log2(math.e))
ONE, ZERO, LOWEST = F(1), F(0), F(-3.4e38)
MIN_EXPONENT = F(-100)
"""Powers of two below are taken for this one: far from what processors take their time for (2^-126)."""
ROUNDS = F(1.5 * 2**23 + 127)
"""Added to a small number: its nearest integer, plus a float32's exponent of one, in the lowest bits."""
EXPONENT_BITS = np.int32(23)
# Chebyshev interpolation of 2^x over -0.5 <= x <= 0.5.
E1, E2, E3 = F(6.93147207e-01), F(2.40226509e-01), F(5.55032723e-02)
E4, E5, E6 = F(9.61805668e-03), F(1.34004282e-03), F(1.54614447e-04)


AT_ONCE = 4096
"""Numbers that are widened at a time: read at once, and not as they were stored, they would be waited for."""


def opened(rows: Any, places: Any) -> Any:
    """Rows of float32 themselves; of bfloat16's bits, their float32 in places of as many numbers."""
    raise NotImplementedError("for compiled loops alone")


def closed(rows: Any, places: Any) -> None:
    """What was done in the places of the rows' float32, rounded, where they have any."""
    raise NotImplementedError("for compiled loops alone")


@overload(opened, inline="always")
def _opened(rows: Any, places: Any) -> Any:
    def of_float32(rows: Any, places: Any) -> Any:
        return rows

    def of_bfloat16(rows: Any, places: Any) -> Any:
        exact = places[: len(rows)]
        rounded, flat = rows.reshape(rows.size), exact.reshape(rows.size)
        # A loop of its own, which becomes vectors.
        for k in range(rows.size):
            flat[k] = widened(rounded[k])
        return exact

    return of_bfloat16 if rows.dtype == numba.types.int16 else of_float32


@overload(closed, inline="always")
def _closed(rows: Any, places: Any) -> Any:
    def of_float32(rows: Any, places: Any) -> None:
        pass

    def of_bfloat16(rows: Any, places: Any) -> None:
        rounded, flat = rows.reshape(rows.size), places[: len(rows)].reshape(rows.size)
        for k in range(rows.size):
            rounded[k] = narrowed(flat[k])

    return of_bfloat16 if rows.dtype == numba.types.int16 else of_float32


@compiled(EXACT)
def exp2(x: Any) -> Any:
    """2^x for x <= 0, to 8e-8 of itself; 2^-100 for less."""
    x = MIN_EXPONENT if x < MIN_EXPONENT else x
    shifted = x + ROUNDS
    rest = x - (shifted - ROUNDS)
    power = E6
    power = power * rest + E5
    power = power * rest + E4
    power = power * rest + E3
    power = power * rest + E2
    power = power * rest + E1
    power = power * rest + ONE
    return power * from_bits(bits(shifted) << EXPONENT_BITS)


HALF_SQUARE = F(-0.5 * math.log2(math.e))
DENSITY = F(1 / math.sqrt(2 * math.pi))
# Chebyshev interpolation, over 0 <= a <= 14, of what exp(-a^2 / 2) is multiplied by to be the probability
# of more than a standard normal deviations; a polynomial of 1 / (1 + TAIL a).
TAIL, FAR = F(0.38), F(14)
T0, T1, T2 = F(-3.56608855e-05), F(1.52433825e-01), F(1.43337573e-01)
T3, T4, T5 = F(1.74871926e-01), F(-6.40197129e-02), F(3.38859670e-01)
T6, T7, T8 = F(-3.98857549e-01), F(1.86230875e-01), F(-3.28209495e-02)


@compiled(EXACT)
def normal(x: Any) -> Any:
    """The standard normal distribution function at x, to 1e-7, and its density, times sqrt(2 pi)."""
    density = ZERO if abs(x) > FAR else exp2(x * x * HALF_SQUARE)
    t = ONE / (ONE + TAIL * abs(x))
    tail = T8
    tail = tail * t + T7
    tail = tail * t + T6
    tail = tail * t + T5
    tail = tail * t + T4
    tail = tail * t + T3
    tail = tail * t + T2
    tail = tail * t + T1
    tail = tail * t + T0
    tail = tail * density
    return (ONE - tail if x > ZERO else tail), density


@compiled(SUMMING)
def soften(
    scores: Any,
    along: Any,
    inverse_sums: Any,
    first: int,
    num_queries: int,
    width: int,
    first_row: int,
) -> None:
    """exp(scores + biases), in their place, over their largest of a query.

    Args:
        scores: (R, h, w), of R queries with the keys of a window; float32, or bfloat16's bits.
        along: (R, 2h - 1 + 2w - 1) of the same, biases by key's row minus query's, and column minus column.
        inverse_sums: (R,), gets what makes a query's sum to one.
        first: of these R among those of all heads, of which each has
        num_queries: in rows of
        width: the first of them in the window's row
        first_row.
    """
    num, h, w = scores.shape
    columns, largest = np.empty(w, F), np.empty(w, F)
    at_once = max(1, AT_ONCE // (h * w))
    places, offset_places = np.empty((at_once, h, w), F), np.empty((at_once, along.shape[1]), F)
    for start in range(0, num, at_once):
        grids = opened(scores[start : start + at_once], places)
        biases = opened(along[start : start + at_once], offset_places)
        for i in range(len(grids)):
            place = (first + start + i) % num_queries
            of_row = h - 1 - first_row - place // width
            of_column = 2 * h - 1 + w - 1 - place % width
            grid, offsets = grids[i], biases[i]
            for k in range(w):
                columns[k] = offsets[of_column + k] * LOG2_E
                largest[k] = LOWEST
            for j in range(h):
                row, line = offsets[of_row + j] * LOG2_E, grid[j]
                for k in range(w):
                    score = line[k] * LOG2_E + (columns[k] + row)
                    line[k] = score
                    largest[k] = score if score > largest[k] else largest[k]
            top = largest[0]
            for k in range(w):
                top = largest[k] if largest[k] > top else top
            flat = grid.reshape(h * w)
            total = ZERO
            for k in range(h * w):
                share = exp2(flat[k] - top)
                flat[k] = share
                total += share
            inverse_sums[start + i] = ONE / total
        closed(scores[start : start + at_once], places)


@compiled(SUMMING)
def soften_back(
    errors: Any,
    shares: Any,
    inverse_sums: Any,
    of_along: Any,
    first: int,
    num_queries: int,
    width: int,
    first_row: int,
) -> None:
    """Gradients of shares to those of scores, in their place, and those of the biases.

    Args:
        errors: (R, h, w), of the shares that sum to one; float32, or bfloat16's bits.
        shares: (R, h, w) of the same, and
        inverse_sums: (R,), as `soften` left them.
        of_along: (R, 2h - 1 + 2w - 1), zeros, get the gradients.
    """
    num, h, w = errors.shape
    columns = np.empty(w, F)
    at_once = max(1, AT_ONCE // (h * w))
    places, share_places = np.empty((at_once, h, w), F), np.empty((at_once, h, w), F)
    for start in range(0, num, at_once):
        grids = opened(errors[start : start + at_once], places)
        grids_of_shares = opened(shares[start : start + at_once], share_places)
        for i in range(len(grids)):
            r = start + i
            place = (first + r) % num_queries
            of_row = h - 1 - first_row - place // width
            of_column = 2 * h - 1 + w - 1 - place % width
            inverse, mean = inverse_sums[r], ZERO
            flat, flat_shares = grids[i].reshape(h * w), grids_of_shares[i].reshape(h * w)
            for k in range(h * w):
                mean += flat[k] * flat_shares[k]
            mean *= inverse
            for k in range(w):
                columns[k] = ZERO
            for j in range(h):
                line, weights = grids[i, j], grids_of_shares[i, j]
                total = ZERO
                for k in range(w):
                    error = (line[k] - mean) * (weights[k] * inverse)
                    line[k] = error
                    columns[k] += error
                    total += error
                of_along[r, of_row + j] = total
            for k in range(w):
                of_along[r, of_column + k] = columns[k]
        closed(errors[start : start + at_once], places)


@compiled(SUMMING)
def _centre(x: Any, bias: Any, p: int, i: int, eps: Any, centred: Any) -> Any:
    """x[p, i] + bias less its mean, into `centred`; returns one by the standard deviation."""
    c = x.shape[2]
    total = ZERO
    for k in range(c):
        biased = x[p, i, k] + bias[k]
        centred[k] = biased
        total += biased
    mean, squares = total / F(c), ZERO
    for k in range(c):
        off = centred[k] - mean
        centred[k] = off
        squares += off * off
    return ONE / np.sqrt(squares / F(c) + eps)


@compiled(SUMMING)
def norm_gelu(x: Any, out: Any, bias: Any, gain: Any, shift: Any, eps: Any) -> None:
    """GELU of a layer norm of x + bias over the last axis: (P, L, C) to (P, L, C)."""
    num, length, c = x.shape
    centred = np.empty(c, F)
    for p in range(num):
        for i in range(length):
            scale = _centre(x, bias, p, i, eps, centred)
            for k in range(c):
                normed = centred[k] * scale * gain[k] + shift[k]
                out[p, i, k] = normed * normal(normed)[0]


@compiled(SUMMING)
def norm_gelu_back(
    gradient: Any,
    x: Any,
    of_x: Any,
    of_bias: Any,
    of_gain: Any,
    of_shift: Any,
    bias: Any,
    gain: Any,
    shift: Any,
    eps: Any,
) -> None:
    """Gradients of `norm_gelu` by that of its result; those of vectors, (P, C), are added to zeros."""
    num, length, c = x.shape
    centred, pulls = np.empty(c, F), np.empty(c, F)
    for p in range(num):
        for i in range(length):
            scale = _centre(x, bias, p, i, eps, centred)
            total, along = ZERO, ZERO
            for k in range(c):
                unit = centred[k] * scale
                normed = unit * gain[k] + shift[k]
                share, density = normal(normed)
                of_normed = gradient[p, i, k] * (share + normed * (DENSITY * density))
                of_gain[p, k] += of_normed * unit
                of_shift[p, k] += of_normed
                of_unit = of_normed * gain[k]
                total += of_unit
                along += of_unit * unit
                pulls[k] = of_unit
            total, along = total / F(c), along / F(c) * scale
            for k in range(c):
                pull = scale * (pulls[k] - total - centred[k] * along)
                of_x[p, i, k] = pull
                of_bias[p, k] += pull


@compiled(SUMMING)
def gelu_mask(x: Any, filters: Any, out: Any, bias: Any, places: Any) -> None:
    """Products of filters (P, 1, C) with the GELU of x + bias, (P, L, C): (P, 1, L), each at its place, (L,)."""
    num, length, c = x.shape
    for p in range(num):
        for i in range(length):
            total = ZERO
            for k in range(c):
                biased = x[p, i, k] + bias[k]
                total += biased * normal(biased)[0] * filters[p, 0, k]
            out[p, 0, places[i]] = total


@compiled(SUMMING)
def gelu_masks(x: Any, filters: Any, out: Any, bias: Any, places: Any) -> None:
    """The same with four filters."""
    num, length, c = x.shape
    for p in range(num):
        for i in range(length):
            first, second, third, fourth = ZERO, ZERO, ZERO, ZERO
            for k in range(c):
                biased = x[p, i, k] + bias[k]
                feature = biased * normal(biased)[0]
                first += feature * filters[p, 0, k]
                second += feature * filters[p, 1, k]
                third += feature * filters[p, 2, k]
                fourth += feature * filters[p, 3, k]
            place = places[i]
            out[p, 0, place], out[p, 1, place] = first, second
            out[p, 2, place], out[p, 3, place] = third, fourth


@compiled(SUMMING)
def gelu_mask_back(
    gradient: Any,
    x: Any,
    filters: Any,
    of_x: Any,
    of_bias: Any,
    of_filters: Any,
    bias: Any,
    places: Any,
) -> None:
    """Gradients of `gelu_mask` by that of its result; bias (P, C) and filters' are added to zeros."""
    num, length, c = x.shape
    for p in range(num):
        for i in range(length):
            pull = gradient[p, 0, places[i]]
            for k in range(c):
                biased = x[p, i, k] + bias[k]
                share, density = normal(biased)
                of_biased = pull * filters[p, 0, k] * (share + biased * (DENSITY * density))
                of_x[p, i, k] = of_biased
                of_bias[p, k] += of_biased
                of_filters[p, 0, k] += pull * (biased * share)


@compiled(SUMMING)
def gelu_masks_back(
    gradient: Any,
    x: Any,
    filters: Any,
    of_x: Any,
    of_bias: Any,
    of_filters: Any,
    bias: Any,
    places: Any,
) -> None:
    """The same of `gelu_masks`."""
    num, length, c = x.shape
    for p in range(num):
        for i in range(length):
            place = places[i]
            first, second = gradient[p, 0, place], gradient[p, 1, place]
            third, fourth = gradient[p, 2, place], gradient[p, 3, place]
            for k in range(c):
                biased = x[p, i, k] + bias[k]
                share, density = normal(biased)
                pull = (
                    first * filters[p, 0, k]
                    + second * filters[p, 1, k]
                    + third * filters[p, 2, k]
                    + fourth * filters[p, 3, k]
                )
                of_biased = pull * (share + biased * (DENSITY * density))
                of_x[p, i, k] = of_biased
                of_bias[p, k] += of_biased
                feature = biased * share
                of_filters[p, 0, k] += first * feature
                of_filters[p, 1, k] += second * feature
                of_filters[p, 2, k] += third * feature
                of_filters[p, 3, k] += fourth * feature


@compiled(SUMMING)
def softmax_of_tokens(scores: Any, bias: Any) -> None:
    """Of (P, T, H, L) scores and (P, T, H) biases, over the T tokens, in the scores' place."""
    num, num_tokens, num_heads, length = scores.shape
    tops, totals = np.empty(length, F), np.empty(length, F)
    for p in range(num):
        for h in range(num_heads):
            for k in range(length):
                tops[k] = scores[p, 0, h, k] + bias[p, 0, h]
                totals[k] = ZERO
            for t in range(1, num_tokens):
                for k in range(length):
                    score = scores[p, t, h, k] + bias[p, t, h]
                    tops[k] = score if score > tops[k] else tops[k]
            for t in range(num_tokens):
                for k in range(length):
                    share = exp2((scores[p, t, h, k] + bias[p, t, h] - tops[k]) * LOG2_E)
                    scores[p, t, h, k] = share
                    totals[k] += share
            for k in range(length):
                totals[k] = ONE / totals[k]
            for t in range(num_tokens):
                for k in range(length):
                    scores[p, t, h, k] *= totals[k]


@compiled(SUMMING)
def softmax_of_tokens_back(errors: Any, shares: Any, of_bias: Any) -> None:
    """Gradients of the shares to those of the scores, in their place, and those of the biases, (P, T, H)."""
    num, num_tokens, num_heads, length = errors.shape
    means = np.empty(length, F)
    for p in range(num):
        for h in range(num_heads):
            for k in range(length):
                means[k] = ZERO
            for t in range(num_tokens):
                for k in range(length):
                    means[k] += errors[p, t, h, k] * shares[p, t, h, k]
            for t in range(num_tokens):
                total = ZERO
                for k in range(length):
                    error = (errors[p, t, h, k] - means[k]) * shares[p, t, h, k]
                    errors[p, t, h, k] = error
                    total += error
                of_bias[p, t, h] = total


def forget_cache() -> None:
    """Compiles without a place on disk from now on."""
    loops: list[Any] = [x for x in globals().values() if isinstance(x, Dispatcher)]
    for loop in loops:
        loop._cache = NullCache()


@compiled(EXACT)
def gelu_back(gradient: Any, x: Any, of_x: Any) -> None:
    """The gradient of a GELU of x, (P, L), by that of its result."""
    num, length = x.shape
    for p in range(num):
        for k in range(length):
            share, density = normal(x[p, k])
            of_x[p, k] = gradient[p, k] * (share + x[p, k] * (DENSITY * density))


RUN = 4096
# Chebyshev interpolation of log(1 + x) / x over 0 <= x <= 1.
L0, L1, L2, L3 = F(0.999999995), F(-0.499998926), F(0.333297105), F(-0.249516163)
L4, L5, L6 = F(0.196632743), F(-0.152696671), F(0.105436238)
L7, L8, L9 = F(-0.0563736132), F(0.0195425274), F(-0.00317605705)


@compiled(EXACT)
def sigmoid(x: Any) -> Any:
    """The sigmoid of x, and log(1 + exp(-|x|)), each to 2e-7 of itself."""
    small = exp2(-abs(x) * LOG2_E)
    inverse = ONE / (ONE + small)
    log = L9
    log = log * small + L8
    log = log * small + L7
    log = log * small + L6
    log = log * small + L5
    log = log * small + L4
    log = log * small + L3
    log = log * small + L2
    log = log * small + L1
    log = log * small + L0
    return (inverse if x >= ZERO else small * inverse), log * small


@compiled(SUMMING)
def pixel_sums(logits: Any, targets: Any, sums: Any, alpha: Any) -> None:
    """What a mask loss is made of.

    Args:
        logits: (P, M, L).
        targets: (P, L) in [0, 1].
        sums: (P, M, 4) get the sums over L of probability, probability x target, cross-entropy, and focal
            loss of gamma 2.
        alpha: the focal loss's weight of the foreground.
    """
    num, num_masks, length = logits.shape
    for p in range(num):
        for m in range(num_masks):
            for k in range(4):
                sums[p, m, k] = ZERO
            # In runs: a million numbers in one sum would lose digits.
            for start in range(0, length, RUN):
                own, truth = logits[p, m, start : start + RUN], targets[p, start : start + RUN]
                area, overlap, entropies, focal = ZERO, ZERO, ZERO, ZERO
                for k in range(len(own)):
                    x, target = own[k], truth[k]
                    probability, log = sigmoid(x)
                    entropy = (x if x > ZERO else ZERO) - x * target + log
                    wrong = probability + target - (probability + probability) * target
                    weight = alpha * target + (ONE - alpha) * (ONE - target)
                    area += probability
                    overlap += probability * target
                    entropies += entropy
                    focal += weight * wrong * wrong * entropy
                sums[p, m, 0] += area
                sums[p, m, 1] += overlap
                sums[p, m, 2] += entropies
                sums[p, m, 3] += focal


@compiled(SUMMING)
def pixel_sums_back(logits: Any, targets: Any, pulls: Any, of_logits: Any, alpha: Any) -> None:
    """The gradients of the logits by those of `pixel_sums`, (P, M, 4)."""
    num, num_masks, length = logits.shape
    for p in range(num):
        for m in range(num_masks):
            of_area, of_overlap = pulls[p, m, 0], pulls[p, m, 1]
            of_entropy, of_focal = pulls[p, m, 2], pulls[p, m, 3]
            for k in range(length):
                x, target = logits[p, m, k], targets[p, k]
                probability, log = sigmoid(x)
                entropy = (x if x > ZERO else ZERO) - x * target + log
                wrong = probability + target - (probability + probability) * target
                weight = of_focal * (alpha * target + (ONE - alpha) * (ONE - target)) * wrong
                slope = probability * (ONE - probability)
                turn = (ONE - target - target) * slope
                of_logits[p, m, k] = (
                    (of_area + of_overlap * target) * slope
                    + (of_entropy + weight * wrong) * (probability - target)
                    + (weight + weight) * turn * entropy
                )


@compiled(EXACT)
def bias_gelu(x: Any, bias: Any) -> None:
    """GELU of (R, C) with a bias (C,), in its place."""
    num, c = x.shape
    for r in range(num):
        for k in range(c):
            biased = x[r, k] + bias[k]
            x[r, k] = biased * normal(biased)[0]
