"""Attention in windows equals the one that stores all scores: in pieces on the CPU, and by torch's kernels."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from torch import Tensor

from sam_train.models import compiled, window_grids
from sam_train.models import rel_pos_attention as kernels
from sam_train.models import windowed_attention as pieces

SIZE, HEADS, WIDTH = (9, 7), 2, 16
WINDOWS = {
    "whole image": (9, 7),
    "padded both ways": (4, 3),
    "no padding": (3, 7),
    "larger": (12, 8),
}


def inputs_of(window: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, positions of rows and of columns, and padding."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, *SIZE, 3, HEADS, WIDTH), *((2 * side - 1, WIDTH) for side in window)]
    shapes.append((3, HEADS, WIDTH))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in made]


def stored(qkv: Tensor, rows: Tensor, columns: Tensor, padding: Tensor, window) -> Tensor:
    """As published: padded, cut into windows, all scores and biases in memory."""
    (h, w), (height, width), n = window, SIZE, len(qkv)
    above, beside = -(-height // h), -(-width // w)
    whole = padding.expand(n, above * h, beside * w, 3, HEADS, WIDTH).clone()
    whole[:, :height, :width] = qkv
    windows = whole.view(n, above, h, beside, w, 3, HEADS, WIDTH).permute(5, 0, 1, 3, 6, 2, 4, 7)
    queries, keys, values = windows.reshape(3, -1, h * w, WIDTH)
    bias = get_decomposed_rel_pos_bias(queries, rows, columns, window, window)
    answer = (queries @ keys.mT * WIDTH**-0.5 + bias).softmax(dim=-1) @ values
    answer = answer.view(n, above, beside, HEADS, h, w, WIDTH).permute(0, 1, 4, 2, 5, 3, 6)
    return answer.reshape(n, above * h, beside * w, -1)[:, :height, :width]


def answer_of(attend, inputs: list[Tensor], window: tuple[int, int]) -> Tensor:
    qkv, rows, columns, padding = inputs
    has_padding = SIZE[0] % window[0] or SIZE[1] % window[1]
    return attend(qkv, (rows, columns), window, padding if has_padding else None)


def gradients_of(answer: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    pull = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))
    scalar = (answer * pull.to(answer.dtype)).sum()
    return torch.autograd.grad(scalar, inputs, allow_unused=True, materialize_grads=True)


def check_against_stored_scores(attend, window: tuple[int, int]) -> None:
    """Answers and gradients."""
    inputs = inputs_of(window, torch.float64)
    expected, got = stored(*inputs, window), answer_of(attend, inputs, window)
    torch.testing.assert_close(got, expected)
    for one, other in zip(gradients_of(got, inputs), gradients_of(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize(
    ("num_heads_at_a_time", "grows"),
    [(100, True), (100, False), (1, True), (0.4, True), (0.4, False), (0, False)],
)
def test_answers_and_gradients_are_those_of_stored_scores(
    window, num_heads_at_a_time, grows, monkeypatch
):
    num_scores = window[0] * window[1] * min(SIZE[0], window[0]) * min(SIZE[1], window[1])
    monkeypatch.setattr(window_grids, "CACHE_FLOATS", int(num_heads_at_a_time * num_scores))
    monkeypatch.setattr(window_grids, "MAX_GROWN", 100.0 if grows else 0.0)
    monkeypatch.setattr(window_grids, "KERNEL_QUERIES", 10)
    check_against_stored_scores(pieces.windowed_attention, window)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("stored_tokens", [1, 1 << 20])
def test_by_torchs_kernels_they_are_the_same(window, stored_tokens, monkeypatch):
    monkeypatch.setattr(kernels, "STORED_TOKENS", stored_tokens)
    check_against_stored_scores(kernels.attend_in_windows, window)


@pytest.mark.parametrize("attend", [pieces.windowed_attention, kernels.attend_in_windows])
def test_positions_of_another_length_are_interpolated(attend, relative_error):
    window = (4, 3)
    qkv, _, _, padding = inputs_of(window, torch.float64)
    positions = [torch.randn(2 * side + 5, WIDTH, dtype=torch.float64) for side in window]
    expected = stored(qkv, *positions, padding, window)
    assert relative_error(attend(qkv, positions, window, padding), expected) < 1e-13


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("has_loops", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_as_near_as_stored_scores_in_it(
    autocast, has_loops, window, relative_error, monkeypatch
):
    monkeypatch.setattr(pieces, "MIN_TOKENS_IN_HALVES", 1)
    if has_loops:
        pytest.importorskip("numba", reason="numba is not installed (sam-train[cpu])")
    else:
        monkeypatch.setattr(compiled, "_loops", lambda: None)
    monkeypatch.setattr(window_grids, "CACHE_FLOATS", 10 * SIZE[0] * SIZE[1])
    inputs = inputs_of(window, torch.float32)
    expected = stored(*inputs, window)
    of_expected = gradients_of(expected, inputs)
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]

    def answer(attend):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert pieces.attends_in_pieces(halves[0], SIZE[0] * SIZE[1])
            got = attend(halves)
        return got, gradients_of(got.float(), halves)

    got, gradients = answer(lambda x: answer_of(pieces.windowed_attention, x, window))
    with torch.no_grad():
        assert torch.equal(answer_of(pieces.windowed_attention, halves, window), got)
    plain, of_plain = answer(lambda x: stored(*x, window))

    assert got.dtype == plain.dtype == torch.bfloat16
    assert {x.dtype for x in gradients} == {torch.bfloat16}
    # All but the padding's, which there is none of.
    for one, other, right in zip(
        (got, *gradients[:3]), (plain, *of_plain[:3]), (expected, *of_expected[:3]), strict=True
    ):
        assert not torch.equal(one, other), "not the same kernels"
        assert relative_error(one.float(), right) < 1.3 * relative_error(other.float(), right)


def test_no_scores_are_kept_for_the_backward_pass():
    window = SIZE
    inputs = inputs_of(window, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        answer_of(pieces.windowed_attention, inputs, window)
    assert max(kept) == inputs[0].numel()


def test_who_attends_in_pieces(monkeypatch):
    x = torch.zeros(1)
    assert pieces.attends_in_pieces(x, 196) and pieces.attends_in_pieces(x.double(), 4096)
    # Without compiled loops, small windows in half precision are left to torch's kernels.
    if compiled.takes_bf16(x.bfloat16()):
        assert pieces.attends_in_pieces(x.bfloat16(), 196)
        monkeypatch.setattr(compiled, "_loops", lambda: None)
    assert pieces.attends_in_pieces(x.bfloat16(), 4096)
    assert not pieces.attends_in_pieces(x.bfloat16(), 196)
    with torch.autocast("cpu", torch.bfloat16):
        assert not pieces.attends_in_pieces(x, 196)
    assert not pieces.attends_in_pieces(x.half(), 4096)
    assert not pieces.attends_in_pieces(x.to("meta"), 4096)

    def within_a_transform(t: Tensor) -> Tensor:
        assert not pieces.attends_in_pieces(t, 196)
        return t

    torch.func.vmap(within_a_transform)(torch.zeros(2, 1))


def test_no_images_and_gradients_of_any_layout(relative_error):
    window = (4, 3)
    inputs = inputs_of(window, torch.float64)
    none = inputs[0].detach()[:0]
    assert answer_of(pieces.windowed_attention, [none, *inputs[1:]], window).shape[0] == 0
    answer = answer_of(pieces.windowed_attention, inputs, window)
    pull = torch.randn(32, *SIZE, 2, dtype=torch.float64).permute(3, 1, 2, 0)
    got = torch.autograd.grad(answer, inputs, pull)
    expected = torch.autograd.grad(stored(*inputs, window), inputs, pull)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_gradients_have_gradients(window):
    """As of a penalty on the gradients, by way of the inputs."""
    inputs = inputs_of(window, torch.float64)

    def of_penalty(attend) -> tuple[Tensor, ...]:
        answer = attend().sin().sum()
        grads = torch.autograd.grad(
            answer, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        penalty = sum(x.square().sum() for x in grads)
        return torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)

    got = of_penalty(lambda: answer_of(pieces.windowed_attention, inputs, window))
    expected = of_penalty(lambda: stored(*inputs, window))
    assert any(x.any() for x in expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
