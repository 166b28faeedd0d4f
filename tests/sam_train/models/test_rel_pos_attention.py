"""Attention with relative positions equals the one that stores all scores, in each of its forms."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

from sam_train.models import rel_pos_attention as module

SIZE = (9, 7)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(6, SIZE[0] * SIZE[1], 16, generator=generator) for _ in range(3)]
    positions = [torch.randn(2 * side - 1, 16, generator=generator) for side in SIZE]
    return [x.requires_grad_() for x in (*tokens, *positions)]


def stored(queries, keys, values, of_rows, of_columns):
    bias = get_decomposed_rel_pos_bias(queries, of_rows, of_columns, SIZE, SIZE)
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5 + bias
    return scores.softmax(dim=-1) @ values


def unstored(queries, keys, values, of_rows, of_columns):
    return module.rel_pos_attention(queries, keys, values, (of_rows, of_columns), SIZE)


@pytest.mark.parametrize(
    "form", ["part of a head", "a few heads", "a matrix of biases", "longer queries and keys"]
)
def test_every_form_and_its_gradients_are_those_of_stored_scores(
    inputs, form, relative_error, monkeypatch
):
    length = SIZE[0] * SIZE[1]
    floats = 10 * length if form == "part of a head" else 4 * length * length
    monkeypatch.setattr(module, "CACHE_FLOATS", floats)
    monkeypatch.setattr(module, "STORED_TOKENS", 1 << 20 if "matrix" in form else 1)
    if form not in ("part of a head", "a few heads"):
        monkeypatch.setattr(module, "is_plain_cpu", lambda _: False)
    pull = torch.randn(6, length, 16)

    expected, got = stored(*inputs), unstored(*inputs)

    assert relative_error(got, expected) < 1e-6
    gradients = torch.autograd.grad((got * pull).sum(), inputs)
    of_expected = torch.autograd.grad((expected * pull).sum(), inputs)
    for one, other in zip(gradients, of_expected, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_on_the_cpu_is_as_near_as_stored_scores_in_it(
    inputs, autocast, relative_error, monkeypatch
):
    monkeypatch.setattr(module, "STORED_TOKENS", 1)
    monkeypatch.setattr(module, "CACHE_FLOATS", 10 * SIZE[0] * SIZE[1])
    pull = torch.randn(6, SIZE[0] * SIZE[1], 16)
    expected = stored(*inputs)
    of_expected = torch.autograd.grad((expected * pull).sum(), inputs)
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]

    def answer(attend):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = attend(*halves)
        return got, torch.autograd.grad((got.float() * pull).sum(), halves)

    got, gradients = answer(unstored)
    plain, of_plain = answer(stored)

    assert got.dtype == plain.dtype == torch.bfloat16
    assert {x.dtype for x in gradients} == {torch.bfloat16}
    for one, other, right in zip(
        (got, *gradients), (plain, *of_plain), (expected, *of_expected), strict=True
    ):
        assert not torch.equal(one, other), "not the same kernels"
        assert relative_error(one.float(), right) < 1.3 * relative_error(other.float(), right)


def test_no_tensor_of_all_scores_is_kept_for_the_backward_pass(inputs, monkeypatch):
    monkeypatch.setattr(module, "STORED_TOKENS", 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        unstored(*inputs)
    assert max(kept) < 6 * (SIZE[0] * SIZE[1]) ** 2


def test_positions_of_another_length_are_interpolated(inputs, relative_error):
    queries, keys, values, *_ = inputs
    positions = [torch.randn(2 * side + 5, 16) for side in SIZE]
    expected = stored(queries, keys, values, *positions)
    assert relative_error(unstored(queries, keys, values, *positions), expected) < 1e-6


def test_longer_queries_and_keys_are_plain_attention(inputs):
    """What the form for other devices rests on: an attention without any bias."""
    queries, keys, values, *_ = inputs
    plain = F.scaled_dot_product_attention(queries, keys, values)
    none = [torch.zeros(2 * side - 1, 16) for side in SIZE]
    torch.testing.assert_close(unstored(queries, keys, values, *none), plain)
