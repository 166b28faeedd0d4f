"""Layers that something was put in the place of, or hung on, count: no faster path steps over them."""

import copy

import pytest
import torch
from segment_anything.modeling.transformer import TwoWayTransformer as PublishedTransformer
from torch import nn
from torch.nn.utils import parametrize, prune

from sam_train.models import mask_decoder
from sam_train.models.image_encoder import SamVitEncoder
from sam_train.models.mask_decoder import MaskDecoder
from sam_train.models.prompt_encoder import PromptEncoder
from sam_train.models.two_way_transformer import TwoWayTransformer
from sam_train.structures import Prompts

WIDTH, GRID, FEW, MANY = 64, 8, 2, 6
ATTENTIONS = ["self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Wrapped(nn.Module):
    """An adapter that shows the weights of the layer it holds, as PEFT's do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.delta = layer, nn.Linear(layer.in_features, layer.out_features)

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)
    in_features = property(lambda self: self.layer.in_features)
    out_features = property(lambda self: self.layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.delta(x)


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x).abs()


def subclassed(layer):
    layer.__class__ = Subclass
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: output.abs())
    return layer


def overridden(layer):
    """The same layer, with another forward of its class."""
    kind = type(layer)
    layer.__class__ = type(
        "Other", (kind,), {"forward": lambda self, x: kind.forward(self, x).abs()}
    )
    return layer


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Double())
    return layer


def build(randomise):
    decoder = MaskDecoder(
        transformer_dim=WIDTH,
        transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, num_heads=2, mlp_dim=48),
    )
    return randomise(decoder).double().eval()


@pytest.fixture(autouse=True)
def share_small_images(monkeypatch):
    monkeypatch.setattr(mask_decoder, "MIN_SHARED_TOKENS", 0)
    monkeypatch.setattr(mask_decoder, "MIN_IMAGE_TOKENS", 0)


@pytest.fixture
def inputs():
    """Embedding, position code, sparse and dense embeddings of as many prompts as are shared."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, WIDTH, GRID, GRID), (1, WIDTH, GRID, GRID), (MANY, 1, WIDTH), (WIDTH, 1, 1)]
    image, code, sparse, dense = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return image, code, sparse, dense.expand(MANY, WIDTH, GRID, GRID)


@torch.no_grad()
def answers(decoder, inputs, count=MANY):
    image, code, sparse, dense = inputs
    return decoder(image, code, sparse[:count], dense[:count], True)[0]


def by_the_published_form(decoder):
    """Turns a decoder to the published transformer with its layers, which calls every one of them."""
    ours = decoder.transformer
    transformer = PublishedTransformer(
        depth=len(ours.layers), embedding_dim=WIDTH, num_heads=2, mlp_dim=48
    ).double()
    for mine, theirs in zip(ours.layers, transformer.layers, strict=True):
        for name in ATTENTIONS:
            for projection in PROJECTIONS:
                layer = getattr(getattr(mine, name), projection)
                setattr(getattr(theirs, name), projection, layer)
        for name in ("norm1", "norm2", "norm3", "norm4"):
            setattr(theirs, name, getattr(mine, name))
        theirs.mlp.lin1, theirs.mlp.lin2 = mine.mlp.lin1, mine.mlp.lin2
    for projection in PROJECTIONS:
        layer = getattr(ours.final_attn_token_to_image, projection)
        setattr(transformer.final_attn_token_to_image, projection, layer)
    transformer.norm_final_attn = ours.norm_final_attn
    decoder.transformer = transformer.eval()
    return decoder


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize(
    "change", [Wrapped, subclassed, hooked, parametrized], ids=lambda change: change.__name__
)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_an_attentions_layers_are_called_when_they_are_not_plain(
    randomise, relative_error, inputs, projection, change, count
):
    decoder = build(randomise)
    before = answers(decoder, inputs, count)
    for name in ATTENTIONS[1:]:
        attention = getattr(decoder.transformer.layers[0], name)
        changed = change(getattr(attention, projection))
        setattr(attention, projection, changed.double())

    got = answers(decoder, inputs, count)

    expected = answers(by_the_published_form(copy.deepcopy(decoder)), inputs, count)
    assert relative_error(got, expected) < 1e-9
    assert relative_error(got, before) > 1e-3


def test_pruned_layers_train(randomise, inputs):
    """Pruning makes the weight anew before each call: a weight that is only read belongs to a freed graph."""
    decoder = build(randomise)
    prune.random_unstructured(
        decoder.transformer.layers[0].cross_attn_token_to_image.k_proj, "weight", 0.5
    )
    image, code, sparse, dense = inputs
    for _ in range(2):
        decoder(image, code, sparse, dense, True)[0].sum().backward()


class Wrapper(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_a_wrapped_block_is_still_a_block(randomise, relative_error, inputs, count):
    decoder = build(randomise)
    before = answers(decoder, inputs, count)
    layers = decoder.transformer.layers
    layers[1] = Wrapper(layers[1])
    assert relative_error(answers(decoder, inputs, count), before) < 1e-9


@pytest.mark.parametrize("change", [hooked, overridden], ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "place",
    [
        "transformer.layers.0.norm4",
        "transformer.norm_final_attn",
        "output_upscaling",
        *(f"output_upscaling.{i}" for i in range(5)),
    ],
)
def test_an_answer_is_the_same_among_few_prompts_and_among_many(
    randomise, relative_error, inputs, place, change
):
    decoder = build(randomise)
    before = answers(decoder, inputs)
    change(decoder.get_submodule(place))
    among_many = answers(decoder, inputs)
    assert relative_error(answers(decoder, inputs, FEW), among_many[:FEW]) < 1e-9
    assert relative_error(among_many, before) > 1e-3


@pytest.mark.parametrize(
    "name", ["transformer", "transformer.layers.1", "transformer.layers.0.norm4"]
)
def test_every_hook_sees_its_module(randomise, inputs, name):
    decoder, seen = build(randomise), []
    decoder.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    answers(decoder, inputs)
    assert seen


@pytest.mark.parametrize("count", [FEW, MANY])
def test_a_relu_in_the_upscaling_and_another_kernel_are_taken(
    randomise, relative_error, inputs, count
):
    decoder = build(randomise)
    decoder.output_upscaling[4] = nn.ReLU()
    decoder.output_upscaling[3] = nn.ConvTranspose2d(WIDTH // 4, WIDTH // 8, 4, 2, 1).double()
    tokens = {}
    hook = decoder.transformer.register_forward_hook(
        lambda module, args, output: tokens.update(out=output)
    )
    got = answers(decoder, inputs, count)
    hook.remove()
    queries, keys = tokens["out"]
    upscaled = decoder.output_upscaling(keys.mT.unflatten(2, (GRID, GRID)))
    filters = [mlp(queries[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    expected = torch.einsum("pmc,pchw->pmhw", torch.stack(filters[1:], dim=1), upscaled)
    assert relative_error(got, expected.detach()) < 1e-9


def test_the_published_transformer_works_for_many_prompts(randomise, relative_error, inputs):
    decoder = build(randomise)
    before = answers(decoder, inputs)
    after = answers(by_the_published_form(decoder), inputs)
    assert relative_error(after, before) < 1e-9


def test_plain_layers_are_still_shared(randomise, inputs, monkeypatch):
    built = []
    monkeypatch.setattr(
        mask_decoder,
        "SharedImage",
        lambda *args, made=mask_decoder.SharedImage: built.append(1) or made(*args),
    )
    answers(build(randomise), inputs)
    assert built


@pytest.mark.parametrize("change", [hooked, overridden], ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "place", ["mask_downscaling", *(f"mask_downscaling.{i}" for i in range(7))]
)
def test_mask_prompts_are_read_by_the_layers_that_are_there(
    randomise, relative_error, place, change
):
    encoder = randomise(PromptEncoder(embed_dim=WIDTH, image_embedding_size=(GRID, GRID)))
    masks = torch.randn(2, 1, 4 * GRID, 4 * GRID)
    with torch.no_grad():
        before = encoder(masks=masks)[1]
        change(encoder.get_submodule(place))
        got = encoder.embed(Prompts(torch.zeros(2, 0, 2), torch.zeros(2, 0).long(), masks))[1]
        reader = encoder.mask_downscaling
        published = reader if place == "mask_downscaling" else nn.Sequential(*reader)
        expected = published(masks)
    assert relative_error(got, expected) < 1e-5
    assert relative_error(got, before) > 1e-3


def encoder_of(randomise):
    encoder = SamVitEncoder(
        embed_dim=32, depth=2, num_heads=2, global_attn_indexes=[1], img_size=64, window_size=3
    )
    return randomise(encoder).eval()


class Adapted(nn.Module):
    """Queries and values with an addition, as the adapters of SAM repositories index them."""

    def __init__(self, qkv):
        super().__init__()
        self.qkv, self.dim = qkv, qkv.in_features
        self.query, self.value = (nn.Linear(self.dim, self.dim, bias=False) for _ in range(2))

    def forward(self, x):
        qkv = self.qkv(x)
        qkv[:, :, :, : self.dim] += self.query(x)
        qkv[:, :, :, -self.dim :] += self.value(x)
        return qkv


@torch.no_grad()
def test_an_adapter_that_indexes_maps_of_queries_keys_and_values_runs(randomise, relative_error):
    encoder, images = encoder_of(randomise), torch.randn(1, 3, 64, 64)
    merged = copy.deepcopy(encoder)
    for block, other in zip(encoder.backbone.blocks, merged.backbone.blocks, strict=True):
        adapted = block.attn.qkv = randomise(Adapted(block.attn.qkv))
        weight = adapted.qkv.weight.clone()
        weight[:32] += adapted.query.weight
        weight[-32:] += adapted.value.weight
        other.attn.qkv.weight.copy_(weight)
        other.attn.qkv.bias.copy_(adapted.qkv.bias)
    assert relative_error(encoder(images), merged(images)) < 1e-4


def with_adapter(mlp):
    return nn.Sequential(mlp, nn.Linear(32, 32))


def with_relu(mlp):
    mlp.act = nn.ReLU()
    return mlp


def with_tanh_gelu(mlp):
    mlp.act = nn.GELU(approximate="tanh")
    return mlp


def hooked_inside(mlp):
    hooked(mlp.fc1)
    return mlp


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [with_adapter, with_relu, with_tanh_gelu, hooked, hooked_inside, overridden],
    ids=lambda change: change.__name__,
)
def test_an_encoders_mlp_is_the_same_in_training_and_after(randomise, relative_error, change):
    encoder, images = encoder_of(randomise), torch.randn(1, 3, 64, 64)
    before = encoder(images)
    for block in encoder.backbone.blocks:
        block.mlp = change(block.mlp)
    got = encoder(images)
    assert relative_error(got, encoder.train()(images)) < 1e-5
    assert relative_error(got, before) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [hooked, overridden, Wrapper], ids=lambda change: change.__name__
)
def test_an_encoders_attention_is_called_when_it_is_not_timms(randomise, relative_error, change):
    encoder, images = encoder_of(randomise), torch.randn(1, 3, 64, 64)
    before = encoder(images)
    for block in encoder.backbone.blocks:
        block.attn = change(block.attn)
    got = encoder(images)
    if change is Wrapper:
        assert relative_error(got, before) < 1e-5
    else:
        assert relative_error(got, before) > 1e-3
