"""Image tokens shared by many prompts are those that every prompt would have by itself."""

import pytest
import torch

from sam_train.models import mask_decoder
from sam_train.models.mask_decoder import MaskDecoder
from sam_train.models.prompt_encoder import PromptEncoder
from sam_train.models.two_way_transformer import TwoWayTransformer
from sam_train.structures import Prompts

WIDTH, GRID = 64, 8


@pytest.fixture(autouse=True)
def share_small_images(monkeypatch):
    monkeypatch.setattr(mask_decoder, "MIN_SHARED_TOKENS", 0)
    monkeypatch.setattr(mask_decoder, "MIN_IMAGE_TOKENS", 0)


def build(randomise, *, depth=2, dropout=0.0):
    transformer = TwoWayTransformer(
        depth=depth, embedding_dim=WIDTH, num_heads=2, mlp_dim=48, dropout=dropout
    )
    decoder = MaskDecoder(transformer_dim=WIDTH, transformer=transformer)
    encoder = PromptEncoder(
        embed_dim=WIDTH,
        image_embedding_size=(GRID, GRID),
        input_image_size=(16 * GRID, 16 * GRID),
    )
    return randomise(decoder).double(), randomise(encoder).double()


def ask(decoder, encoder, embeddings, prompts, image_index, multimask_output=True):
    sparse, dense = encoder.embed_unread(prompts)
    return decoder(embeddings, encoder.get_dense_pe(), sparse, dense, multimask_output, image_index)


def made_up_prompts(count, has_masks):
    generator = torch.Generator().manual_seed(1)
    coords = 16 * GRID * torch.rand(count, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, -1]]).expand(count, 2)
    masks = torch.randn(count, 1, 4 * GRID, 4 * GRID, generator=generator, dtype=torch.float64)
    return Prompts(coords, labels, masks.requires_grad_() if has_masks else None)


@pytest.fixture
def count_shared(monkeypatch):
    """How many times an image was shared."""
    built = []

    class Counted(mask_decoder.SharedImage):
        def __init__(self, *arguments):
            built.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr(mask_decoder, "SharedImage", Counted)
    return built


@pytest.mark.parametrize("has_masks", [False, True], ids=["first answer", "masks fed back"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "image_index",
    [None, [0] * 5 + [1] * 4, [0, 2, 0, 2, 2, 0, 1, 1, 1, 0, 2, 1, 0]],
    ids=["one image", "in order", "mixed"],
)
def test_answers_and_gradients_are_those_of_separate_images(
    randomise, relative_error, monkeypatch, count_shared, image_index, depth, has_masks
):
    decoder, encoder = build(randomise, depth=depth)
    index = None if image_index is None else torch.tensor(image_index)
    num_images = 1 if image_index is None else max(image_index) + 1
    prompts = made_up_prompts(6 if image_index is None else len(image_index), has_masks)
    embeddings = torch.randn(num_images, WIDTH, GRID, GRID, dtype=torch.float64).requires_grad_()
    inputs = [embeddings, *decoder.parameters(), *encoder.parameters()]
    if has_masks:
        inputs.append(prompts.mask_inputs)
    # Runs of several prompts, and a shorter one.
    monkeypatch.setattr(mask_decoder, "CHUNK_TOKENS", 3 * GRID * GRID)

    answers, gradients = [], []
    for least in (4, 1000):
        monkeypatch.setattr(mask_decoder, "MIN_SHARING", least)
        masks, ious = ask(decoder, encoder, embeddings, prompts, index)
        pull = torch.linspace(-1, 1, masks.numel(), dtype=torch.float64).view_as(masks)
        total = (masks * pull).sum() + ious.sum()
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True))
        answers.append((masks, ious))

    assert len(count_shared) == num_images
    for shared, separate in zip(*answers, strict=True):
        assert relative_error(shared, separate) < 1e-9
    for shared, separate in zip(*gradients, strict=True):
        if separate is None:
            assert shared is None
        else:
            torch.testing.assert_close(shared, separate, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("multimask_output", [True, False])
def test_single_precision_loses_nothing_to_sums_of_products(
    randomise, relative_error, count_shared, multimask_output
):
    decoder, encoder = (module.float() for module in build(randomise))
    coords, labels, _ = made_up_prompts(6, has_masks=False)
    embeddings = torch.randn(1, WIDTH, GRID, GRID)
    with torch.no_grad():
        arguments = (embeddings, Prompts(coords.float(), labels, None), None, multimask_output)
        shared = ask(decoder, encoder, *arguments)
        exact = ask(
            decoder.double(),
            encoder.double(),
            embeddings.double(),
            Prompts(coords, labels, None),
            None,
            multimask_output,
        )
        assert len(count_shared) == 2
    decoder.float(), encoder.float()
    mask_decoder_separate = [
        ask(
            decoder,
            encoder,
            embeddings,
            Prompts(coords[i : i + 1].float(), labels[:1], None),
            None,
            multimask_output,
        )
        for i in range(6)
    ]
    separate = [torch.cat(parts) for parts in zip(*mask_decoder_separate, strict=True)]
    for one, other, true in zip(shared, separate, exact, strict=True):
        assert relative_error(one.double(), true) < 3 * relative_error(other.double(), true) + 1e-6


@pytest.mark.parametrize("why", ["dropout", "few prompts", "dense of each", "half precision"])
def test_what_cannot_be_shared_is_answered_one_by_one(randomise, count_shared, why):
    decoder, encoder = build(randomise, dropout=0.1 if why == "dropout" else 0.0)
    prompts = made_up_prompts(3 if why == "few prompts" else 6, has_masks=False)
    sparse, dense = encoder.embed(prompts)
    pe, embeddings = encoder.get_dense_pe(), torch.randn(1, WIDTH, GRID, GRID).double()
    if why == "dense of each":
        dense = dense.clone()
    if why == "half precision":
        decoder.bfloat16()
        sparse, dense, pe, embeddings = (x.bfloat16() for x in (sparse, dense, pe, embeddings))
    decoder(embeddings, pe, sparse, dense, True)
    assert not count_shared
    if why == "dropout":
        decoder.eval()(embeddings, pe, sparse, dense, True)
        assert count_shared, "in eval mode nothing is dropped"


def test_one_dense_embedding_stands_for_all_prompts(randomise, relative_error, count_shared):
    decoder, encoder = build(randomise)
    embeddings = torch.randn(1, WIDTH, GRID, GRID, dtype=torch.float64)
    code = encoder.get_dense_pe()
    for count in (2, 6):
        sparse, dense = encoder.embed(made_up_prompts(count, False))
        one, _ = decoder(embeddings, code, sparse, dense[:1].clone(), True)
        each, _ = decoder(embeddings, code, sparse, dense.clone(), True)
        assert relative_error(one, each) < 1e-9
    assert count_shared
    with pytest.raises(ValueError, match="of all 6 prompts, got 2"):
        decoder(embeddings, code, sparse, dense[:2], True)


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize(
    ("index", "message"), [([0, 1, 0], "got the shape"), ([2], "got 2"), ([-1], "got -1")]
)
def test_an_index_of_other_prompts_or_images_is_refused(randomise, count, index, message):
    decoder, encoder = build(randomise)
    prompts = made_up_prompts(count, False)
    index = torch.tensor(index if len(index) > 1 else index * count)
    embeddings = torch.randn(2, WIDTH, GRID, GRID, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"image_index .* {message}"):
        ask(decoder, encoder, embeddings, prompts, index)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_values_whose_bias_cancels_the_image_cost_no_digits(
    randomise, relative_error, count_shared, layer
):
    decoder, encoder = build(randomise)
    looked = decoder.transformer.layers[layer].cross_attn_image_to_token
    looked.v_proj.bias.copy_(3e3 * torch.randn(WIDTH // 2))
    away = looked.out_proj.weight @ looked.v_proj.bias
    embeddings = torch.randn(1, WIDTH, GRID, GRID, dtype=torch.float64)
    if layer == 0:
        embeddings = embeddings - away[None, :, None, None]
    else:
        decoder.transformer.layers[0].norm4.bias.sub_(away)
    prompts = made_up_prompts(8, False)
    exact = ask(decoder, encoder, embeddings, prompts, None)[0]
    decoder, encoder = decoder.float(), encoder.float()
    prompts = prompts._replace(point_coords=prompts.point_coords.float())
    got = ask(decoder, encoder, embeddings.float(), prompts, None)[0]
    assert len(count_shared) == 2
    assert relative_error(got.double(), exact) < 1e-3


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_images_are_not_shared_in_less_than_float32(
    randomise, count_shared, matmul_precision, precision
):
    decoder, encoder = (part.float() for part in build(randomise))
    prompts = made_up_prompts(8, False)
    prompts = prompts._replace(point_coords=prompts.point_coords.float())
    matmul_precision(precision)
    ask(decoder, encoder, torch.randn(1, WIDTH, GRID, GRID), prompts, None)
    assert bool(count_shared) == (precision == "highest")


@torch.no_grad()
def test_a_compiler_sees_one_graph(randomise, relative_error):
    decoder, encoder = build(randomise)
    sparse, dense = encoder.embed(made_up_prompts(8, False))
    inputs = (
        torch.randn(1, WIDTH, GRID, GRID).double(),
        encoder.get_dense_pe(),
        sparse,
        dense,
        True,
    )
    index = torch.zeros(8, dtype=torch.long)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    assert relative_error(compiled(*inputs, index)[0], decoder(*inputs, index)[0]) < 1e-9
