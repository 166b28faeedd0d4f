"""The loops that Numba compiles give what torch's kernels give, with its gradients, on any number of threads."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from sam_train.losses.mask import MaskLoss, pixel_sums
from sam_train.models import compiled
from sam_train.models.gelu import gelu
from sam_train.models.image_encoder import SamVitEncoder
from sam_train.models.mask_decoder import MaskDecoder
from sam_train.models.two_way_transformer import TwoWayTransformer
from sam_train.models.upscaling import Upscaling
from sam_train.models.windowed_attention import windowed_attention

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed (sam-train[cpu])"
)
P, LENGTH, C = 3, 33, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def without_numba(monkeypatch):
    """Runs a function as where Numba is not installed."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "_loops", lambda: None)
            return function()

    return run


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(outputs, inputs):
    pulls = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, inputs, pulls)


def close(got, expected, tolerance=2e-6):
    """To a share of the largest."""
    for one, other in zip(got, expected, strict=True):
        one, other = one.detach().double(), other.detach().double()
        assert float((one - other).abs().max()) <= tolerance * max(float(other.abs().max()), 1e-3)


def test_they_are_for_plain_float32_on_the_cpu():
    x = torch.zeros(2)
    assert compiled.takes(x)
    assert not compiled.takes(x.double()) and not compiled.takes(x.bfloat16())
    assert not compiled.takes(x, x.double())
    assert not compiled.takes(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not compiled.takes(x)
        assert compiled.takes_bf16(x.bfloat16())
    assert not compiled.takes_bf16(x) and not compiled.takes_bf16(x.half())
    assert not compiled.takes_bf16(x.bfloat16(), x)
    assert not compiled.takes_bf16(x.bfloat16().to("meta"))

    def looked_through(x):
        assert not compiled.takes(x) and not compiled.takes_bf16(x.bfloat16())
        return x + 1

    torch.func.vmap(looked_through)(torch.zeros(2, 2))
    make_fx(looked_through)(x)


@pytest.mark.parametrize(("value", "is_on"), [("1", False), ("0", True), ("", True)])
def test_where_numba_is_not_to_compile_torch_does_it(monkeypatch, value, is_on):
    """Uncompiled they would be Python's loops over pixels."""
    monkeypatch.setenv("NUMBA_DISABLE_JIT", value)
    compiled._loops.cache_clear()
    try:
        assert compiled.takes(torch.zeros(1)) == is_on
    finally:
        monkeypatch.undo()
        compiled._loops.cache_clear()


@pytest.mark.parametrize("kind", [ImportError, SystemError, AttributeError])
def test_a_numba_that_does_not_load_is_named(monkeypatch, kind):
    def fails(name):
        raise kind("Numba needs NumPy 1.0 or less")

    monkeypatch.setattr(compiled, "import_module", fails)
    compiled._loops.cache_clear()
    try:
        with pytest.warns(UserWarning, match="needs NumPy 1.0"):
            assert not compiled.takes(torch.zeros(1))
    finally:
        compiled._loops.cache_clear()


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same(monkeypatch):
    loops, calls = compiled._loops(), []

    def full(*arrays):
        calls.append(arrays)
        if len(calls) == 1:
            raise OSError("no space left on device")

    monkeypatch.setattr(loops, "bias_gelu", full)
    monkeypatch.setattr(loops, "forget_cache", lambda: calls.append("forgotten"))
    with pytest.warns(UserWarning, match="no space left"):
        compiled.bias_gelu(torch.zeros(1, 2), torch.zeros(2))
    assert calls[1] == "forgotten" and len(calls) == 3


def test_without_a_place_on_disk_loops_compile(tmp_path):
    """In a process of its own: the others keep theirs."""
    code = """if True:
        import torch
        from sam_train.models import compiled
        compiled._loops().forget_cache()
        print(compiled.bias_gelu(torch.ones(1, 2), torch.zeros(2))[0, 0].item())
    """
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert float(run.stdout) == pytest.approx(0.8413447)
    assert not list(tmp_path.rglob("*.nbc"))


def test_graphs_are_made_of_torchs_kernels():
    targets = torch.rand(P, 4, 4) > 0.5
    logits = torch.randn(P, 2, 4, 4)
    graph = make_fx(lambda x: MaskLoss()(x, targets))(torch.zeros_like(logits))
    torch.testing.assert_close(graph(logits), MaskLoss()(logits, targets))


@pytest.mark.parametrize(("window", "rows", "first_row"), [((4, 6), 4, 0), ((9, 5), 2, 3)])
def test_scores_with_biases_are_softened(window, rows, first_row):
    (h, w), width, num_heads = window, window[1] - 1, 3
    scores = 20 * torch.randn(num_heads, rows * width, h * w)
    along = 5 * torch.randn(num_heads, rows * width, 2 * (h + w) - 2)
    places = torch.arange(rows * width)
    of_rows = torch.arange(h) - (first_row + places // width)[:, None] + h - 1
    of_columns = torch.arange(w) - (places % width)[:, None] + 2 * h - 1 + w - 1
    exact = along.double().requires_grad_()
    bias = (
        exact.gather(2, of_rows.expand(num_heads, -1, -1))[..., None]
        + exact.gather(2, of_columns.expand(num_heads, -1, -1))[..., None, :]
    )
    wanted = scores.double().requires_grad_()
    expected = (wanted + bias.flatten(2)).softmax(dim=-1)

    shares = scores.clone()
    factors = compiled.soften(shares, along, window, width, first_row)

    close([shares * factors], [expected])
    pulls = torch.randn_like(scores)
    errors = pulls.clone()
    of_along = compiled.soften_back(errors, shares, factors, window, width, first_row)
    close([errors, of_along], torch.autograd.grad(expected, (wanted, exact), pulls.double()))


@pytest.mark.parametrize("window", [(4, 6), (14, 14), (70, 60)])
def test_bfloat16_is_float32_but_for_its_rounding(window, two_threads):
    """Bit for bit, whether rows of a window are widened many at a time or, longer, each by itself."""
    (h, w), num_heads, num_queries = window, 5, 2 * window[1]
    scores = (8 * torch.randn(num_heads, num_queries, h * w)).bfloat16()
    along = torch.randn(num_heads, num_queries, 2 * (h + w) - 2).bfloat16()
    pulls = torch.randn_like(scores)

    shares, exact_shares = scores.clone(), scores.float()
    factors = compiled.soften(shares, along, window, w, 1)
    expected = compiled.soften(exact_shares, along.float(), window, w, 1)
    errors, exact_errors = pulls.clone(), pulls.float()
    of_along = compiled.soften_back(errors, shares, factors, window, w, 1)
    of_expected = compiled.soften_back(exact_errors, shares.float(), expected, window, w, 1)

    assert torch.equal(factors, expected) and factors.dtype == torch.float32
    assert torch.equal(shares, exact_shares.bfloat16())
    assert torch.equal(errors, exact_errors.bfloat16()) and torch.equal(of_along, of_expected)


def test_bfloat16_that_is_no_number_stays_none():
    """Whatever lies in its other bits, which the rounding must not carry over."""
    bits = torch.tensor([0x7FFFBDAE, 0x7F800001, -1, -0x26E3, -0x7FE2D6, 0x7FC00000])
    inverse = bits.to(torch.int32).view(torch.float32)
    assert inverse.isnan().all()
    errors = torch.ones(1, len(inverse), 4, dtype=torch.bfloat16)
    shares = torch.ones_like(errors)
    compiled.soften_back(errors, shares, inverse.view(1, -1, 1), (2, 2), 2, 0)
    assert errors.isnan().all()


def test_a_window_of_one_key_leaves_its_score_no_gradient():
    for dtype in (torch.float32, torch.bfloat16):
        scores, along = torch.randn(3, 5, 1).to(dtype), torch.randn(3, 5, 2).to(dtype)
        factors = compiled.soften(scores, along, (1, 1), 1, 0)
        errors = torch.randn(3, 5, 1).to(dtype)
        of_along = compiled.soften_back(errors, scores, factors, (1, 1), 1, 0)
        assert not errors.any() and not of_along.any()


def upscaled_by(dtype, num_masks, has_bias):
    torch.manual_seed(1)
    layers = Upscaling(4 * C)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.5)
    layers.to(dtype)
    x = torch.randn(P, 5, 3, 4, C).to(dtype).requires_grad_()
    filters = torch.randn(P, num_masks, C // 2).to(dtype).requires_grad_()
    bias = layers[0].bias if has_bias else None
    masks = layers.masks(x, filters, bias)
    weights = [layers[1].weight, layers[1].bias, layers[3].weight, layers[3].bias]
    inputs = [x, filters, *weights, *([bias] if has_bias else [])]
    return masks, inputs


@pytest.mark.parametrize("num_masks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_upscaling_and_its_gradients(num_masks, has_bias):
    """More masks than the loops take at once are torch's."""
    (got, inputs), (expected, exact) = (
        upscaled_by(dtype, num_masks, has_bias) for dtype in (torch.float32, torch.float64)
    )
    close([got], [expected])
    close(gradients([got], inputs), gradients([expected], exact))


def test_upscaling_differentiates_twice():
    def of_gradient(dtype):
        masks, inputs = upscaled_by(dtype, 3, True)
        first = torch.autograd.grad(masks.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    close(of_gradient(torch.float32), of_gradient(torch.float64), tolerance=1e-5)


def test_second_derivatives_reach_through_a_slice():
    masks, inputs = upscaled_by(torch.float32, 1, False)
    x, filters = inputs[:2]
    layers = Upscaling(4 * C)
    wide = torch.cat([x, x], dim=-1).detach().requires_grad_()

    def second(features):
        masks = layers.masks(features, filters)
        (first,) = torch.autograd.grad(masks.square().sum(), wide, create_graph=True)
        return torch.autograd.grad(first.square().sum(), wide)[0]

    torch.testing.assert_close(second(wide[..., :C]), second(wide[..., :C].contiguous()))


def test_gradients_under_autocast_are_those_without():
    masks, inputs = upscaled_by(torch.float32, 3, True)
    expected = torch.autograd.grad(masks.sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(masks.sum(), inputs)
    close(got, expected)


def test_the_order_of_pixels_is_made_on_the_cpu():
    layers, filters = Upscaling(4 * C), torch.randn(P, 1, C // 2)
    x = torch.randn(P, 2, 11, 4, C)
    torch.set_default_device("meta")
    try:
        got = layers.masks(x, filters)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, layers.masks(x, filters))


def test_layers_whose_channels_do_not_fit_are_torchs_to_refuse():
    with pytest.raises(RuntimeError):
        Upscaling(4 * C).masks(torch.zeros(P, 5, 3, 2, C), torch.zeros(P, 1, C // 2))
    with pytest.raises(RuntimeError):
        Upscaling(4 * C).masks(torch.zeros(P, 5, 3, 4, C), torch.zeros(P, 1, C // 2), torch.ones(2))
    layers = Upscaling(4 * C)
    with pytest.raises(RuntimeError):
        layers.masks(torch.zeros(P, 5, 3, 4, C), torch.zeros(P, 1, C // 2 + 1))
    layers[1].bias = nn.Parameter(torch.zeros(C - 1))
    with pytest.raises(RuntimeError):
        layers.masks(torch.zeros(P, 5, 3, 4, C), torch.zeros(P, 1, C // 2))


def test_gelu_has_torchs_gradients_and_theirs():
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.zeros(1)]).view(2, -1).requires_grad_()
    exact = x.detach().double().requires_grad_()
    got, expected = gelu(x), F.gelu(exact)
    first = torch.autograd.grad(got.sum(), x, create_graph=True)
    of_exact = torch.autograd.grad(expected.sum(), exact, create_graph=True)
    close(first, of_exact)
    second = torch.autograd.grad(first[0].sum(), x)
    close(second, torch.autograd.grad(of_exact[0].sum(), exact))


def test_sizes_that_do_not_fit_are_refused():
    """Loops look at no bounds."""
    x, bias, places = torch.zeros(2, 3, 4), torch.zeros(4), torch.arange(3)
    with pytest.raises(ValueError, match="channels"):
        compiled.bias_gelu(x[0], bias[:3])
    with pytest.raises(ValueError, match="channels"):
        compiled.NormGelu(bias, bias[:2], bias, 1e-6)(x)
    with pytest.raises(ValueError, match="channels"):
        compiled.gelu_masks(x, bias, torch.zeros(2, 1, 5), places)
    with pytest.raises(ValueError, match="channels"):
        compiled.gelu_masks(x, bias, torch.zeros(2, 1, 4), places[:2])
    with pytest.raises(ValueError, match="channels"):
        compiled.pixel_sums(x, torch.zeros(1, 4), 0.25)
    with pytest.raises(ValueError, match="contiguous"):
        compiled.bias_gelu(x[:, 0].T, torch.zeros(2))


def test_gelu_far_out_is_nothing_or_all():
    x = torch.tensor([[-1e38, -1e10, -20.0, 20.0, 1e10]])
    got = compiled.bias_gelu(x.clone(), torch.zeros(5))
    assert torch.equal(got, x.clamp_min(0.0))


def test_gelu_with_a_bias_in_its_place():
    x, bias = 4 * torch.randn(LENGTH, C), torch.randn(C)
    expected = F.gelu((x + bias).double())
    assert compiled.bias_gelu(x, bias) is x
    close([x], [expected])


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_softmax_over_tokens(length):
    scores, bias = 20 * torch.randn(P, 5, 2, length), torch.randn(P, 5, 2)
    expected = (scores + bias[..., None]).double().softmax(dim=1)
    shares = compiled.softmax_of_tokens(scores.clone(), bias)
    close([shares], [expected])
    pulls = torch.randn_like(scores)
    weighed = (pulls * expected).sum(dim=1, keepdim=True)
    of_scores, of_bias = compiled.softmax_of_tokens_back(pulls.clone(), shares)
    wanted = (pulls - weighed) * expected
    close([of_scores, of_bias], [wanted, wanted.sum(dim=-1)])


@pytest.mark.parametrize("length", [1, 100, 4096, 10_001])
def test_pixels_are_summed(length):
    logits = 10 * torch.randn(P, 2, length)
    targets = torch.rand(P, length).round(decimals=0 if length == 100 else 3)
    exact = logits.double().requires_grad_()
    expected = pixel_sums(exact, targets.double(), 0.3, 2.0)
    close(compiled.pixel_sums(logits, targets, 0.3).unbind(-1), expected.unbind(-1), tolerance=3e-6)
    pulls = torch.randn(P, 2, 4)
    got = compiled.pixel_sums_back(pulls, logits, targets, 0.3)
    close([got], torch.autograd.grad(expected, exact, pulls.double()))


@pytest.mark.parametrize(
    "loss", [MaskLoss(), MaskLoss(focal=0.0, bce=1.0), MaskLoss(focal_gamma=1.5, focal_alpha=0.6)]
)
def test_mask_losses_with_and_without(without_numba, loss):
    targets = torch.rand(P, 6, 7) > 0.5
    logits = (5 * torch.randn(P, 3, 6, 7)).requires_grad_()

    def run():
        value = loss(logits, targets)
        first = torch.autograd.grad(value.sum(), logits, create_graph=True)
        return value, *first, *torch.autograd.grad(first[0].square().sum(), logits)

    close(run(), without_numba(run), tolerance=5e-6)


def test_targets_of_other_sizes_are_torchs_to_spread_or_refuse():
    logits, targets = torch.randn(P, 2, 4, 4), torch.rand(1, 4, 4) > 0.5
    expected = MaskLoss()(logits, targets.expand(P, -1, -1))
    torch.testing.assert_close(MaskLoss()(logits, targets), expected)
    with pytest.raises(RuntimeError):
        MaskLoss()(logits[:1], targets.expand(P, -1, -1))


def test_a_loss_of_no_weight_has_no_gradient():
    """Where a pixel is surely right, the focal loss of a gamma below one is steep without end."""
    logits = torch.full((1, 1, 4, 4), 30.0, requires_grad=True)
    loss = MaskLoss(focal=0.0, bce=1.0, focal_gamma=0.5)(logits, torch.ones(1, 4, 4))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()


def test_no_images_in_a_large_window():
    tables = torch.zeros(79, 16), torch.zeros(79, 16)
    assert windowed_attention(torch.zeros(0, 40, 40, 3, 2, 16), tables, (40, 40), None).shape == (
        0,
        40,
        40,
        32,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(value):
    """A loss that is none must not look like one."""
    logits = torch.zeros(1, 1, 64)
    logits[0, 0, 40] = value
    if value != value:
        assert compiled.pixel_sums(logits, torch.zeros(1, 64), 0.25).isnan().all()
        assert compiled.bias_gelu(logits[0].clone(), torch.zeros(64)).isnan().any()
    for dtype in (torch.float32, torch.bfloat16):
        shares, along = logits.to(dtype, copy=True), torch.zeros(1, 1, 30, dtype=dtype)
        factors = compiled.soften(shares, along, (8, 8), 8, 0)
        assert (shares * factors).isnan().any()
    scores = logits.view(1, 1, 1, 64).repeat(1, 3, 1, 1)
    assert compiled.softmax_of_tokens(scores, torch.zeros(1, 3, 1))[..., 40].isnan().all()
    features = torch.zeros(1, 16, 4)
    features[0, 5, 2] = value
    masks = compiled.gelu_masks(features, torch.zeros(4), torch.ones(1, 1, 4), torch.arange(16))
    assert not masks[0, 0, 5].isfinite() and masks[0, 0, :5].isfinite().all()


def encode_and_decode():
    """Windows with padding, a global block, many prompts at two images, and all gradients."""
    torch.manual_seed(2)
    encoder = SamVitEncoder(
        embed_dim=32,
        depth=2,
        num_heads=2,
        global_attn_indexes=[1],
        img_size=96,
        patch_size=8,
        out_chans=64,
        window_size=5,
    )
    decoder = MaskDecoder(
        transformer_dim=64,
        transformer=TwoWayTransformer(depth=2, embedding_dim=64, num_heads=4, mlp_dim=64),
    )
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        if name.endswith("bias") or "pos" in name:
            nn.init.normal_(parameter, std=0.1)
    images = encoder(torch.randn(2, 3, 96, 96))
    masks, ious = decoder(
        images,
        torch.randn(1, 64, 12, 12),
        torch.randn(6, 2, 64),
        torch.randn(1, 64, 1, 1).expand(6, -1, 12, 12),
        True,
        torch.tensor([0, 0, 0, 1, 1, 1]),
    )
    if not torch.is_grad_enabled():
        return masks, ious
    parameters = [*encoder.parameters(), *decoder.parameters()]
    pulls = (masks * torch.linspace(-1, 1, masks.numel()).view_as(masks)).sum() + ious.sum()
    grads = torch.autograd.grad(pulls, parameters, allow_unused=True)
    return masks, ious, *(x for x in grads if x is not None)


@pytest.mark.parametrize("wants_gradients", [True, False])
def test_a_model_answers_and_learns_the_same_without_numba(without_numba, wants_gradients):
    with torch.set_grad_enabled(wants_gradients):
        got, expected = encode_and_decode(), without_numba(encode_and_decode)
    got, expected = [[x.detach() for x in answers] for answers in (got, expected)]
    norm = torch.stack([x.norm() for x in expected]).norm()
    for one, other in zip(got, expected, strict=True):
        # Where a gradient is rounding noise, such as a key's bias, by the size of the others.
        assert float((one - other).norm()) <= 2e-5 * float(other.norm().clamp(min=1e-3 * norm))


@pytest.mark.parametrize("wants_gradients", [True, False])
def test_in_bfloat16_a_model_is_as_near_float32_as_without_numba(without_numba, wants_gradients):
    def answers():
        return torch.cat([x.detach().float().flatten() for x in encode_and_decode()])

    with torch.set_grad_enabled(wants_gradients):
        exact = answers()
        with torch.autocast("cpu", torch.bfloat16):
            got, plain = answers(), without_numba(answers)
    assert not torch.equal(got, plain), "no loop was taken"
    assert (got - exact).norm() < 1.2 * (plain - exact).norm()


def test_two_threads_give_the_same_bit_for_bit(monkeypatch, two_threads):
    """Each slice is its own, so that the order of no sum depends on who took it."""
    x, bias = torch.randn(16, LENGTH, C), torch.randn(C)
    filters, pulls = torch.randn(16, 3, C), torch.randn(16, 3, LENGTH)
    places = torch.randperm(LENGTH)

    def run():
        norm = compiled.NormGelu(bias, bias + 1, bias - 1, 1e-6)
        return (
            norm(x),
            *norm.back(x, x + 1),
            compiled.gelu_masks(x, bias, filters, places),
            *compiled.gelu_masks_back(pulls, x, bias, filters, places),
        )

    monkeypatch.setattr(compiled, "MIN_OF_SLICE", 1)
    two = run()
    torch.set_num_threads(1)
    for one, other in zip(run(), two, strict=True):
        assert torch.equal(one, other)


def test_slices_cover_the_length_once_on_torchs_threads(monkeypatch, two_threads):
    monkeypatch.setattr(compiled, "MIN_OF_SLICE", 1)
    taken = []
    compiled._in_slices(lambda start, stop: taken.append((start, stop)), 11, 100)
    assert [i for start, stop in sorted(taken) for i in range(start, stop)] == list(range(11))
    assert len(taken) == (2 if compiled._openmp() is not None else 1)


@pytest.mark.parametrize("kind", [ValueError, IndexError])
def test_an_error_in_a_slice_is_raised(monkeypatch, two_threads, kind):
    monkeypatch.setattr(compiled, "MIN_OF_SLICE", 1)

    def work(start, stop):
        if start:
            raise kind(f"in {start}")

    with pytest.raises(kind, match="in "):
        for _ in range(20):
            compiled._in_slices(work, 4, 100)


@pytest.mark.skipif(compiled._openmp() is None, reason="torch's threads are not GNU's OpenMP")
def test_an_interrupt_is_never_lost(monkeypatch, two_threads):
    """ctypes drops what a handler raises as it enters a function."""

    class Library:
        def GOMP_parallel(self, function, *_):
            """Never gets to the function's first line."""

    monkeypatch.setattr(compiled, "MIN_OF_SLICE", 1)
    monkeypatch.setattr(compiled, "_openmp", Library)
    with pytest.raises(KeyboardInterrupt):
        compiled._in_slices(lambda start, stop: None, 4, 100)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_computes_too(two_threads):
    """As the workers of a data loader are: they have one thread."""
    x, bias = torch.randn(64, 4096), torch.randn(4096)
    expected = compiled.bias_gelu(x.clone(), bias)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(compiled.bias_gelu(x, bias), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
