"""Fast forms read weights; a layer that was put in another's place is called, whatever is asked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sam_train.models.image_encoder import SamVitEncoder
from sam_train.models.mask_decoder import MaskDecoder
from sam_train.models.prompt_encoder import PromptEncoder
from sam_train.models.sam import Sam
from sam_train.models.two_way_transformer import TwoWayTransformer
from sam_train.structures import ImageFeatures

FEW, MANY = 2, 64
"""Prompts: token by token, and with a shared image."""


@pytest.fixture(scope="module")
def sam() -> Sam:
    """Of 256 px, whose windows of 7 need padding, and whose decoder shares images."""
    torch.manual_seed(0)
    model = Sam(
        image_encoder=SamVitEncoder(
            embed_dim=32,
            depth=2,
            num_heads=2,
            global_attn_indexes=[1],
            img_size=256,
            window_size=7,
            out_chans=256,
        ),
        prompt_encoder=PromptEncoder(embed_dim=256),
        mask_decoder=MaskDecoder(
            transformer_dim=256,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=64),
        ),
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.1)
    return model.eval()


def answers(model: Sam, num_prompts: int, *, has_masks: bool = False) -> Tensor:
    """The masks of as many clicks, of a picture of noise."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 256, 256, generator=generator)
    coords = 256 * torch.rand(num_prompts, 1, 2, generator=generator)
    masks = torch.randn(num_prompts, 1, 64, 64, generator=generator) if has_masks else None
    labels = torch.ones(num_prompts, 1, dtype=torch.long)
    prompts = model.prompt_encoder.to_prompts((coords, labels), masks=masks)
    with torch.no_grad():
        features = ImageFeatures(model.image_encoder(image))
        return model.decode(features, prompts, multimask_output=True).low_res_masks


def amplified(module: nn.Module) -> nn.Module:
    """As an adapter does it: of a class of its own, with the weights of what it is in the place of."""

    class Amplified(type(module)):  # type: ignore[misc]
        def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
            out = super().forward(*args, **named)
            return 20 * out.abs() if isinstance(out, Tensor) else tuple(20 * x.abs() for x in out)

    module.__class__ = Amplified
    return module


def hooked(module: nn.Module) -> nn.Module:
    def amplify(module: nn.Module, args: object, out: object) -> object:
        return 20 * out.abs() if isinstance(out, Tensor) else tuple(20 * x.abs() for x in out)  # type: ignore[attr-defined]

    module.register_forward_hook(amplify)
    return module


PLACES = [
    "image_encoder.backbone.blocks.0.attn",
    "image_encoder.backbone.blocks.0.attn.qkv",
    "image_encoder.backbone.blocks.1.attn.proj",
    "image_encoder.backbone.blocks.0.mlp",
    "image_encoder.backbone.blocks.0.mlp.fc1",
    "image_encoder.backbone.blocks.0.mlp.act",
    "image_encoder.backbone.blocks.0.mlp.fc2",
    "image_encoder.backbone.blocks.0.norm1",
    "image_encoder.backbone.blocks.1.ls1",
    "image_encoder.backbone.blocks.1.drop_path2",
    *(
        f"mask_decoder.transformer.layers.1.{attention}.{layer}_proj"
        for attention in ("cross_attn_token_to_image", "cross_attn_image_to_token")
        for layer in ("q", "k", "v", "out")
    ),
    "mask_decoder.transformer.layers.0.self_attn.v_proj",
    "mask_decoder.transformer.final_attn_token_to_image.v_proj",
    "mask_decoder.transformer.layers.0.cross_attn_image_to_token",
    "mask_decoder.transformer.layers.0.norm4",
    "mask_decoder.transformer.layers.1",
    "mask_decoder.transformer",
    *(f"mask_decoder.output_upscaling.{number}" for number in range(5)),
    "mask_decoder.output_upscaling",
]


@pytest.mark.parametrize("change", [amplified, hooked])
@pytest.mark.parametrize("place", PLACES)
def test_a_layer_in_anothers_place_is_called_for_few_prompts_and_for_many(
    sam: Sam, place: str, change: Callable[[nn.Module], nn.Module]
) -> None:
    before = {count: answers(sam, count) for count in (FEW, MANY)}
    changed = copy.deepcopy(sam)
    change(changed.get_submodule(place))
    for count, masks in before.items():
        assert (answers(changed, count) - masks).abs().max() > 1e-5 * masks.abs().max(), count


@pytest.mark.parametrize("number", range(7))
def test_a_replaced_reader_of_masks_is_called(sam: Sam, number: int) -> None:
    before = answers(sam, FEW, has_masks=True)
    changed = copy.deepcopy(sam)
    amplified(changed.prompt_encoder.mask_downscaling[number])
    assert not torch.allclose(answers(changed, FEW, has_masks=True), before, rtol=1e-4)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_layers_that_are_called_answer_as_those_that_are_read(sam: Sam, count: int) -> None:
    expected = answers(sam, count, has_masks=True)
    called = copy.deepcopy(sam)
    for module in called.modules():
        module.register_forward_hook(lambda *_: None)
    got = answers(called, count, has_masks=True)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_an_adapter_that_counts_on_the_layout_of_tokens_gets_it(sam: Sam) -> None:
    """Low-rank adapters of queries and values are often written for (N, H, W, C)."""

    class Adapter(nn.Module):
        def __init__(self, qkv: nn.Module, dim: int) -> None:
            super().__init__()
            self.qkv, self.dim = qkv, dim

        def forward(self, x: Tensor) -> Tensor:
            qkv = self.qkv(x)
            qkv[:, :, :, : self.dim] += x
            return qkv

    changed = copy.deepcopy(sam)
    block = changed.image_encoder.backbone.blocks[0]
    block.attn.qkv = Adapter(block.attn.qkv, 32)
    assert not torch.equal(answers(changed, FEW), answers(sam, FEW))


def test_one_dense_embedding_is_for_all_prompts_and_another_number_is_refused(sam: Sam) -> None:
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    embeddings, sparse = torch.randn(1, 256, 16, 16), torch.randn(5, 2, 256)
    _, dense = encoder(None, None, None)
    pe = encoder.get_dense_pe()
    with torch.no_grad():
        one = decoder(embeddings, pe, sparse, dense, True)[0]
        each = decoder(embeddings, pe, sparse, dense.repeat(5, 1, 1, 1), True)[0]
        assert torch.allclose(one, each, atol=1e-5)
        with pytest.raises(ValueError, match="of one or of all 5 prompts, got 2"):
            decoder(embeddings, pe, sparse, dense.repeat(2, 1, 1, 1), True)
        with pytest.raises(ValueError, match="image of each of the 5 prompts"):
            decoder(embeddings, pe, sparse, dense, True, torch.zeros(3, dtype=torch.long))


def test_no_prompts_have_no_masks(sam: Sam) -> None:
    masks, ious = sam.mask_decoder(
        torch.randn(1, 256, 16, 16),
        sam.prompt_encoder.get_dense_pe(),
        torch.zeros(0, 2, 256),
        torch.zeros(0, 256, 16, 16),
        True,
    )
    assert masks.shape == (0, 3, 64, 64) and ious.shape == (0, 3)


def test_half_precision_reads_masks(sam: Sam) -> None:
    half = copy.deepcopy(sam).to(torch.bfloat16)
    prompts = half.prompt_encoder.to_prompts(
        (torch.ones(2, 1, 2), torch.ones(2, 1)), masks=torch.zeros(2, 1, 64, 64)
    )
    assert half.prompt_encoder.embed(prompts)[1].dtype == torch.bfloat16
