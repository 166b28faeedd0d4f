"""Matrix products by oneDNN are torch's own, gradients too."""

import pytest
import torch
from torch import nn

from sam_train.models import products
from sam_train.models.products import Linear, bmm, linear, linear_gelu, use_fast_linears

needs_onednn = pytest.mark.skipif(
    products._ONEDNN is None or not torch.backends.mkldnn.is_available(),
    reason="this torch has no oneDNN linear",
)


@pytest.fixture(autouse=True)
def _whatever_processor_this_is(monkeypatch):
    monkeypatch.setattr(products, "PREFERS_MKL", False)


def test_where_mkl_is_preferred_all_products_are_torchs(monkeypatch):
    monkeypatch.setattr(products, "PREFERS_MKL", True)
    x, weight = torch.randn(2048, 64, requires_grad=True), torch.randn(64, 64)
    batch = torch.randn(2, 512, 512)

    assert "_Linear" not in type(linear(x, weight).grad_fn).__name__
    assert torch.equal(products.products(batch, batch), torch.bmm(batch, batch))


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_strided", [True, False])
def test_a_linear_layer_and_its_gradients_are_torchs(has_bias, is_strided, relative_error):
    torch.manual_seed(0)
    x = torch.randn(96, 2, 160).transpose(0, 1) if is_strided else torch.randn(2, 96, 160)
    weight = torch.randn(160, 80).mT if is_strided else torch.randn(80, 160)
    bias = torch.randn(80) if has_bias else None
    inputs = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    pull = torch.randn(2, 96, 80)

    out = linear(x, weight, bias)
    expected = torch.nn.functional.linear(x, weight, bias)

    assert "_Linear" in type(out.grad_fn).__name__, "torch's own was taken"
    assert relative_error(out, expected) < 1e-6
    got = torch.autograd.grad((out * pull).sum(), inputs)
    for one, other in zip(got, torch.autograd.grad((expected * pull).sum(), inputs), strict=True):
        assert relative_error(one, other) < 1e-5


@needs_onednn
def test_rows_of_a_wider_matrix_are_packed_first(monkeypatch):
    """oneDNN falls back to a plain loop over them."""
    seen = []
    monkeypatch.setattr(
        products, "_ONEDNN", lambda x, w, *_: seen.extend([x, w]) or torch.zeros(len(x), len(w))
    )
    wide = torch.randn(200, 300)
    linear(wide[:, :150], wide[:, 150:])
    assert all(t.is_contiguous() for t in seen)


@needs_onednn
def test_what_needs_no_gradient_gets_none():
    x = torch.randn(64, 160)
    weight = torch.randn(160, 160, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


@needs_onednn
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("is_strided", [True, False])
def test_products_of_batches_and_their_gradients_are_torchs(count, is_strided, relative_error):
    torch.manual_seed(0)
    shapes = (count, 128, 130), (count, 130, 140)
    a, b = (
        (torch.randn(n, j, i).mT if is_strided else torch.randn(n, i, j)).requires_grad_()
        for n, i, j in shapes
    )
    pull = torch.randn(count, 128, 140)
    out, expected = bmm(a, b), torch.bmm(a, b)
    assert "_Bmm" in type(out.grad_fn).__name__, "torch's own was taken"
    assert relative_error(out, expected) < 1e-6
    got = torch.autograd.grad((out * pull).sum(), (a, b))
    for one, other in zip(got, torch.autograd.grad((expected * pull).sum(), (a, b)), strict=True):
        assert relative_error(one, other) < 1e-5


def test_half_precision_is_left_to_torch():
    x, layer = torch.randn(64, 160), Linear(160, 160)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_layers_built_elsewhere_keep_their_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x, names = torch.randn(3, 8), list(model.state_dict())
    expected = model(x)
    use_fast_linears(model)
    assert [type(layer) for layer in model] == [Linear, nn.ReLU, Linear]
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), expected)


@needs_onednn
def test_a_linear_layer_and_its_gelu_in_one_are_torchs(monkeypatch, relative_error):
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(2, 96, 160),
        torch.randn(80, 160, requires_grad=True),
        torch.randn(80),
    )
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    out = linear_gelu(x, weight, bias)
    assert out.requires_grad and relative_error(out, expected) < 1e-6
    monkeypatch.setattr(torch.nn.functional, "gelu", None)
    with torch.no_grad():
        assert relative_error(linear_gelu(x, weight, bias), expected) < 1e-6


def test_in_bfloat16_a_gelu_is_put_in_the_place_of_the_products_alone(monkeypatch):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(128, 160), torch.randn(80, 160), torch.randn(80)
    given, products = [t.clone() for t in (x, weight, bias)], []
    linear = torch.nn.functional.linear
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = torch.nn.functional.gelu(linear(x, weight, bias))
        monkeypatch.setattr(
            torch.nn.functional,
            "linear",
            lambda *args: products.append(linear(*args)) or products[0],
        )
        got = linear_gelu(x, weight, bias)
    assert torch.equal(got, expected) and got.dtype == torch.bfloat16
    assert [got.data_ptr()] == [x.data_ptr() for x in products]
    assert all(map(torch.equal, (x, weight, bias), given))


@needs_onednn
@pytest.mark.parametrize("function", [linear, lambda x, w: bmm(x, w.mT[None].expand(3, -1, -1))])
def test_gradients_of_gradients_are_torchs(function, relative_error):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 128, 160), torch.randn(160, 160)

    def penalty(multiply):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = multiply(*inputs)
        (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs)

    for got, expected in zip(penalty(function), penalty(nn.functional.linear), strict=True):
        assert relative_error(got, expected) < 1e-5


@needs_onednn
def test_function_transforms_work(relative_error):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 96, 160), torch.randn(160, 160)

    def loss(multiply):
        return lambda w: multiply(x, w).square().sum()

    got = torch.func.grad(loss(linear))(weight)
    assert relative_error(got, torch.func.grad(loss(nn.functional.linear))(weight)) < 1e-5
    rows = torch.func.vmap(linear, in_dims=(0, None))(x, weight)
    assert relative_error(rows, nn.functional.linear(x, weight)) < 1e-5
