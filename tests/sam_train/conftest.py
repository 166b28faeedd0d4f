"""The published SAM at toy sizes, with weights under which every part of it shows in the answer."""

from __future__ import annotations

from functools import partial

import pytest
import segment_anything.modeling as published
import torch
from torch import Tensor, nn


@pytest.fixture
def randomise():
    """Gives a model seeded weights: positions, biases and embeddings too, which start as zeros."""

    def fill(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_position = "pos" in name.rsplit(".", 1)[-1] or "embed" in name.split(".")[-2]
                if parameter.dim() == 1:
                    noise = 1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
                elif not is_position and "_token" not in name.split(".")[-2]:
                    noise *= parameter[0].numel() ** -0.5
                parameter.copy_(noise)
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
                if name.endswith("running_var"):
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
                # Drawn where the model is built, from no seed: a predicted IoU that happens to be all but
                # nothing has a relative error without bound.
                if name.endswith("gaussian_matrix"):
                    buffer.copy_(torch.randn(buffer.shape, generator=generator))
        return model

    return fill


@pytest.fixture
def published_sam(randomise):
    """Builds `segment_anything`'s SAM: 128 px, 8 x 8 tokens, windows of 3 that need padding."""

    def build(
        *,
        img_size: int = 128,
        embed_dim: int = 48,
        depth: int = 3,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        global_attn_indexes: tuple[int, ...] = (1,),
        window_size: int = 3,
        in_chans: int = 3,
        out_chans: int = 32,
        iou_head_depth: int = 4,
        iou_head_hidden_dim: int = 24,
        mlp_dim: int = 64,
        seed: int = 0,
    ) -> published.Sam:
        grid = img_size // 16
        model = published.Sam(
            image_encoder=published.ImageEncoderViT(
                img_size=img_size,
                embed_dim=embed_dim,
                depth=depth,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                global_attn_indexes=global_attn_indexes,
                window_size=window_size,
                in_chans=in_chans,
                out_chans=out_chans,
            ),
            prompt_encoder=published.PromptEncoder(
                embed_dim=out_chans,
                image_embedding_size=(grid, grid),
                input_image_size=(img_size, img_size),
                mask_in_chans=16,
            ),
            mask_decoder=published.MaskDecoder(
                num_multimask_outputs=3,
                transformer=published.TwoWayTransformer(
                    depth=2, embedding_dim=out_chans, mlp_dim=mlp_dim, num_heads=8
                ),
                transformer_dim=out_chans,
                iou_head_depth=iou_head_depth,
                iou_head_hidden_dim=iou_head_hidden_dim,
            ),
        )
        return randomise(model, seed).eval()

    return build


@pytest.fixture
def official_file(published_sam, tmp_path):
    """The published toy SAM and the `.pth` of its weights."""
    model = published_sam()
    path = tmp_path / "official.pth"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.fixture
def relative_error():
    """The largest difference, relative to the largest number expected."""

    def measure(got: Tensor, expected: Tensor) -> float:
        assert got.shape == expected.shape
        return ((got - expected).abs().max() / expected.abs().max()).item()

    return measure


@pytest.fixture(params=["point", "points", "box", "box+points", "mask", "point+mask", "all"])
def prompt_case(request):
    """Prompts of one kind as a function of how many and for which image side: `segment_anything`'s names."""
    kinds = {"box+points": "box points", "point+mask": "point mask", "all": "box points mask"}

    def build(num_prompts: int, side: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(num_prompts)
        wanted = kinds.get(request.param, request.param).split()
        prompts: dict[str, Tensor] = {}
        num_points = 1 if "point" in wanted else 3 if "points" in wanted else 0
        if num_points:
            shape = (num_prompts, num_points)
            prompts["point_coords"] = side * torch.rand(*shape, 2, generator=generator)
            prompts["point_labels"] = torch.randint(0, 2, shape, generator=generator)
        if "box" in wanted:
            corners = side * torch.rand(num_prompts, 2, 2, generator=generator)
            prompts["boxes"] = corners.sort(dim=1).values.flatten(1)
        if "mask" in wanted:
            logits = torch.randn(num_prompts, 1, side // 4, side // 4, generator=generator)
            prompts["mask_inputs"] = 5 * logits
        return prompts

    return build
