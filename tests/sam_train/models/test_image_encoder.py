"""The encoders: published constants, any size, and what training asks of them."""

import copy
from functools import partial

import pytest
import torch
from timm.models.vision_transformer_sam import Block
from torch import nn

from sam_train.models.image_encoder import SamVitEncoder, TimmEncoder, TinyVitEncoder

small_vit = partial(
    SamVitEncoder, embed_dim=32, depth=4, num_heads=2, global_attn_indexes=[1, 3], window_size=3
)


@pytest.fixture(params=["vit", "tiny_vit", "timm"])
def make_encoder(request):
    """Builds a small encoder of each kind for 64 px images."""
    return {
        "vit": partial(small_vit, img_size=64, out_chans=16),
        "tiny_vit": partial(TinyVitEncoder, img_size=64, out_chans=16),
        "timm": partial(TimmEncoder, name="convnext_atto", img_size=64, out_chans=16),
    }[request.param]


def test_every_norm_has_the_published_epsilon():
    norms = [module for module in small_vit().modules() if isinstance(module, nn.LayerNorm)]
    # Two a block and two in the neck.
    assert len(norms) == 2 * 4 + 2
    assert {norm.eps for norm in norms} == {1e-6}


def test_tiny_vit_keeps_its_resolution_at_the_last_merging():
    encoder = TinyVitEncoder(img_size=128)
    strides = [stage.downsample.conv2.conv.stride for stage in encoder.backbone.stages[1:]]
    assert strides == [(2, 2), (2, 2), (1, 1)]
    assert encoder(torch.zeros(1, 3, 128, 128)).shape == (1, 256, 8, 8)


@pytest.mark.parametrize("img_size", [256, 512, 1536])
def test_positions_for_1024_px_are_interpolated_to_any_size(img_size, randomise, relative_error):
    narrow = partial(small_vit, embed_dim=8, num_heads=1, depth=2, out_chans=8, img_size=img_size)
    encoder = randomise(narrow(pretrain_img_size=1024)).eval()
    grid = img_size // 16
    at_size = narrow().eval()
    state = encoder.state_dict()
    positions = state["backbone.pos_embed"].permute(0, 3, 1, 2)
    positions = nn.functional.interpolate(positions, (grid, grid), mode="bicubic", antialias=True)
    state["backbone.pos_embed"] = positions.permute(0, 2, 3, 1)
    for axis in "hw":
        # Of the one block with global attention.
        name = f"backbone.blocks.1.attn.rel_pos_{axis}"
        assert len(state[name]) == 2 * 64 - 1
        offsets = nn.functional.interpolate(state[name].T[None], 2 * grid - 1, mode="linear")
        state[name] = offsets[0].T
    at_size.load_state_dict(state)
    image = torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        embeddings = encoder(image)
        assert embeddings.shape == (1, 8, grid, grid)
        assert relative_error(embeddings, at_size(image)) < 1e-5


def test_a_vit_trains_at_another_size_than_its_positions():
    encoder = small_vit(img_size=96, pretrain_img_size=64, out_chans=8)
    encoder(torch.randn(1, 3, 96, 96)).square().mean().backward()
    grad = encoder.backbone.pos_embed.grad
    assert grad.shape[1:3] == (4, 4)
    assert grad.any()


@pytest.mark.parametrize("img_size", [60, 100])
def test_a_size_that_is_no_multiple_of_the_stride_is_refused(make_encoder, img_size):
    with pytest.raises(ValueError, match=f"multiple of the stride 16, got {img_size}"):
        make_encoder(img_size=img_size)


@pytest.mark.parametrize("in_chans", [1, 5])
def test_any_number_of_channels_is_encoded(make_encoder, in_chans):
    encoder = make_encoder(in_chans=in_chans)
    assert encoder.in_chans == in_chans
    assert encoder(torch.randn(2, in_chans, 64, 64)).shape == (2, 16, 4, 4)


def test_recomputing_activations_leaves_answer_and_gradients_alike(make_encoder, randomise):
    plain = randomise(make_encoder()).eval()
    recomputed = randomise(make_encoder(grad_checkpointing=True)).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    calls = []
    recomputed.backbone.register_forward_hook(lambda *_: calls.append("whole"))
    inner = max(recomputed.modules(), key=lambda m: isinstance(m, nn.Linear))
    inner.register_forward_hook(lambda *_: calls.append("inner"))

    answers = []
    for encoder in (plain, recomputed):
        embeddings = encoder(images)
        calls.append("backward")
        embeddings.square().mean().backward()
        answers.append(embeddings)

    assert "inner" in calls[calls[::-1].index("backward") * -1 :], "nothing was recomputed"
    torch.testing.assert_close(*answers)
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "make_encoder",
    [
        partial(small_vit, img_size=64, drop_path_rate=0.5),
        partial(TinyVitEncoder, img_size=64, drop_path_rate=0.5),
        partial(TimmEncoder, name="convnext_atto", img_size=64, backbone={"drop_path_rate": 0.5}),
    ],
    ids=["vit", "tiny_vit", "timm"],
)
def test_stochastic_depth_drops_paths_in_training_alone(make_encoder, randomise):
    encoder = randomise(make_encoder())
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        once, twice = encoder.train()(images), encoder(images)
        steady, again = encoder.eval()(images), encoder(images)
    assert not torch.equal(once, twice)
    assert torch.equal(steady, again)


@pytest.mark.parametrize("depth_of_drop", [0.2])
def test_the_rate_of_stochastic_depth_rises_to_the_last_block(depth_of_drop):
    blocks = small_vit(drop_path_rate=depth_of_drop).backbone.blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.2 / 3, 0.4 / 3, 0.2])


def test_eval_mode_follows_the_weights_and_gradients_twice(make_encoder, randomise):
    encoder = make_encoder().eval()
    images = torch.randn(1, 3, 64, 64)
    for _ in range(2):
        encoder(images).square().mean().backward()
    copied = copy.deepcopy(encoder)
    randomise(encoder, seed=1)
    copied.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(encoder(images), copied(images))
        fresh = make_encoder().eval()
        fresh.load_state_dict(encoder.state_dict())
        assert torch.equal(encoder(images), fresh(images))


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("vit_small_patch16_224", 16),
        ("convnext_atto", 16),
        ("convnext_atto", 8),
        ("repvit_m1", 16),
        ("resnet18", 8),
        ("swin_tiny_patch4_window7_224", 16),
    ],
)
def test_any_timm_backbone_gives_an_embedding_at_the_stride(name, stride):
    encoder = TimmEncoder(name=name, img_size=256, stride=stride, out_chans=32).train()
    embeddings = encoder(torch.randn(2, 3, 256, 256))
    assert embeddings.shape == (2, 32, 256 // stride, 256 // stride)
    embeddings.square().mean().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


def test_layers_start_at_their_fan_in_where_asked():
    def spread(fan_in_init: bool) -> dict[str, float]:
        encoder = TimmEncoder(name="convnext_atto", img_size=64, fan_in_init=fan_in_init)
        return {
            name: float(layer.weight.detach().std()) * layer.weight[0].numel() ** 0.5
            for name, layer in encoder.backbone.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        }

    assert all(0.7 < value < 1.1 for value in spread(True).values())
    assert min(spread(False).values()) < 0.2, "timm's own start"


def test_a_stride_that_a_backbone_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match=r"vit_tiny_patch16_224 has features at strides .* not at 8"
    ):
        TimmEncoder(name="vit_tiny_patch16_224", img_size=64, stride=8)


def test_a_plain_vit_runs_at_another_size_than_its_positions():
    build = partial(TimmEncoder, name="vit_tiny_patch16_224", out_chans=8)
    stored = build(img_size=64)
    encoder = build(img_size=128, pretrain_img_size=64)
    encoder.load_state_dict(stored.state_dict())
    assert encoder(torch.randn(1, 3, 128, 128)).shape == (1, 8, 8, 8)


def test_fine_features_travel_in_the_channels_of_the_embedding() -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder(
        name="convnext_atto", img_size=64, stride=8, out_chans=16, high_res_chans=4
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        embedding = encoder(images)
        levels = encoder.backbone(images)
        coarse = encoder.neck(levels[1:])
        fine = encoder.high_res_neck(levels[0], coarse)

    assert embedding.shape == (2, 16 + 4 * 4, 8, 8)
    assert fine.shape == (2, 4, 16, 16)
    assert torch.equal(embedding[:, :16], coarse)
    assert torch.equal(torch.nn.functional.pixel_shuffle(embedding[:, 16:], 2), fine)


def test_fine_features_need_a_level_of_half_the_stride() -> None:
    with pytest.raises(ValueError, match=r"features at strides .*, not at 2"):
        TimmEncoder(name="convnext_atto", img_size=64, stride=4, high_res_chans=4)


@pytest.mark.parametrize("img_size", [96, 160])
def test_windows_with_padding_answer_as_timms_blocks_do(img_size: int) -> None:
    torch.manual_seed(0)
    encoder = SamVitEncoder(
        embed_dim=32,
        depth=3,
        num_heads=2,
        global_attn_indexes=[2],
        img_size=img_size,
        window_size=4,
    )
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, img_size, img_size)
    blocks = encoder.backbone.blocks

    answers, gradients = [], []
    for is_ours in (True, False):
        for block in blocks:
            block.__class__ = type(blocks[0]) if is_ours else Block
        encoder.zero_grad()
        answer = encoder(images)
        (answer * torch.linspace(-1, 1, answer.numel()).view_as(answer)).sum().backward()
        answers.append(answer.detach())
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters()})

    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-4)
    for name, gradient in gradients[1].items():
        difference = (gradients[0][name] - gradient).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-4, name
