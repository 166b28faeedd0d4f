"""A timm backbone and a neck: an image to its embedding.

Three forms, each with `img_size`, `stride`, `in_chans` and `out_chans`: SAM's own windowed ViT, MobileSAM's
TinyViT, and any timm backbone that gives feature maps.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureHookNet
from timm.models.tiny_vit import Attention as TinyVitAttention
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from sam_train.models.necks import FPNNeck, HighResNeck, SimpleNeck
from sam_train.models.products import use_fast_linears
from sam_train.models.windowed_block import WindowedBlock

_HOOKED = threading.Lock()
"""timm keeps the features that its hooks find in the model, where a pass of another thread would take them."""


class SamVitEncoder(nn.Module):
    """SAM's encoder: timm's `VisionTransformerSAM` with the published layer-norm epsilon, 1e-6.

    Positions, absolute and relative, are stored for `pretrain_img_size` and interpolated to whatever
    size comes, so a checkpoint of 1024 pixels runs and trains at any multiple of the patch.

    Args:
        embed_dim: width of the blocks.
        depth: number of blocks.
        num_heads: heads of each block.
        mlp_ratio: inner width of the blocks' MLPs, in widths of the block.
        global_attn_indexes: blocks with global attention; the others attend in windows.
        img_size: side of the padded square input, pixels.
        pretrain_img_size: the side that the stored positions are for; `img_size` by default.
        out_chans: C of the image embedding.
        in_chans: image channels.
        patch_size: pixels of a patch's side, which is the stride.
        window_size: tokens of a window's side.
        drop_path_rate: stochastic depth of the last block, rising linearly to it.
        grad_checkpointing: recompute each block in the backward pass.
    """

    # timm's attributes are its own.
    backbone: Any

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_attn_indexes: Sequence[int],
        mlp_ratio: float = 4.0,
        img_size: int = 1024,
        pretrain_img_size: int | None = None,
        out_chans: int = 256,
        in_chans: int = 3,
        patch_size: int = 16,
        window_size: int = 14,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_img_size(img_size, patch_size)
        self.img_size, self.stride = img_size, patch_size
        self.in_chans, self.out_chans = in_chans, out_chans
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.backbone = VisionTransformerSAM(
            img_size=pretrain_img_size or img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
            use_abs_pos=True,
            use_rel_pos=True,
            window_size=window_size,
            block_fn=WindowedBlock,
            global_attn_indexes=tuple(global_attn_indexes),
            neck_chans=out_chans,
        )
        use_fast_linears(self.backbone)
        self.backbone.set_grad_checkpointing(grad_checkpointing)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_chans, H, W) normalised images to (N, C, H / stride, W / stride)."""
        return self.backbone.forward_features(images)


class _UncachedAttention(TinyVitAttention):
    """TinyViT's attention without timm's cache of the expanded biases in eval mode.

    The cache outlives a change of the weights, and a graph that a first backward pass has freed.
    """

    attention_bias_idxs: Tensor

    def get_attention_biases(self, device: torch.device) -> Tensor:
        return self.attention_biases[:, self.attention_bias_idxs]


class TinyVitEncoder(nn.Module):
    """MobileSAM's encoder: TinyViT whose last merging keeps its resolution, and SAM's neck.

    Args:
        name: a timm `tiny_vit_*` architecture.
        img_size: side of the padded square input, pixels.
        out_chans: C of the image embedding.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block, rising linearly to it.
        grad_checkpointing: recompute the stages in the backward pass; batch norms then count a step's
            statistics twice.
    """

    # timm's attributes are its own.
    backbone: Any

    def __init__(
        self,
        *,
        name: str = "tiny_vit_5m_224",
        img_size: int = 1024,
        out_chans: int = 256,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_img_size(img_size, 16)
        self.img_size, self.stride = img_size, 16
        self.in_chans, self.out_chans = in_chans, out_chans
        self.backbone = timm.create_model(
            name, num_classes=0, in_chans=in_chans, drop_path_rate=drop_path_rate
        )
        # timm halves the resolution at every merging (stride 32); MobileSAM keeps it at the last one.
        self.backbone.stages[-1].downsample.conv2.conv.stride = (1, 1)
        for module in self.backbone.modules():
            if isinstance(module, TinyVitAttention):
                module.__class__ = _UncachedAttention
        # The classifier's norm, which feeds no mask: without it no parameter stays unused.
        self.backbone.head = nn.Identity()
        use_fast_linears(self.backbone)
        self.backbone.set_grad_checkpointing(grad_checkpointing)
        self.neck = SimpleNeck(self.backbone.num_features, out_chans)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_chans, H, W) normalised images to (N, C, H / 16, W / 16)."""
        return self.neck(self.backbone.forward_features(images))


class TimmEncoder(nn.Module):
    """Any timm backbone that gives feature maps, joined by a feature pyramid at one stride.

    Args:
        name: a timm architecture, such as `convnext_atto` or `vit_small_patch16_224`.
        img_size: side of the padded square input, pixels.
        stride: pixels between the tokens of the embedding; finer features see smaller objects.
        out_chans: C of the image embedding.
        in_chans: image channels.
        pretrain_img_size: the side that stored positions are for, where there are any; `img_size` by
            default.
        max_stride: backbone levels coarser than this are left out.
        pretrained: timm's weights, downloaded or from its cache.
        high_res_chans: channels of finer features, of half the stride, that travel with the embedding for
            a decoder with a first guess; 0 for none.
        fan_in_init: without pretrained weights, start every layer at a standard deviation of
            fan_in ** -0.5 and not as timm does: ConvNeXt's 0.02 leaves narrow layers all but linear.
        backbone: further arguments of the timm model.
    """

    # timm's attributes are its own.
    backbone: Any

    def __init__(
        self,
        *,
        name: str,
        img_size: int,
        pretrain_img_size: int | None = None,
        stride: int = 16,
        out_chans: int = 256,
        in_chans: int = 3,
        max_stride: int = 32,
        pretrained: bool = False,
        fan_in_init: bool = False,
        grad_checkpointing: bool = False,
        high_res_chans: int = 0,
        backbone: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_img_size(img_size, max(stride, 16))
        self.img_size, self.stride = img_size, stride
        self.in_chans, self.out_chans = in_chans, out_chans
        self.high_res_chans = high_res_chans
        finest = stride // 2 if high_res_chans else stride
        build = partial(
            timm.create_model,
            name,
            features_only=True,
            pretrained=pretrained,
            in_chans=in_chans,
            **_size_arguments(name, img_size, pretrain_img_size or img_size),
            **(backbone or {}),
        )
        info: Any = build().feature_info
        # One level a stride, the deepest: a plain ViT gives the same stride for every block.
        levels = {r: i for i, r in enumerate(info.reduction()) if finest <= r <= max_stride}
        if missing := {finest, stride} - levels.keys():
            raise ValueError(
                f"{name} has features at strides {info.reduction()}, not at {min(missing)}"
            )
        self.backbone = build(out_indices=tuple(levels.values()))
        use_fast_linears(self.backbone)
        if grad_checkpointing:
            # Where timm only wraps the model, the wrapper does not pass this on.
            getattr(self.backbone, "model", self.backbone).set_grad_checkpointing()
        if not pretrained:
            _start_biases_off_zero(self.backbone)
            if fan_in_init:
                _start_at_fan_in(self.backbone)
        channels = self.backbone.feature_info.channels()
        self.high_res_neck: HighResNeck | None = None
        if high_res_chans:
            self.high_res_neck = HighResNeck(channels[0], out_chans, high_res_chans)
            channels = channels[1:]
        self.neck = FPNNeck(channels, out_chans)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_chans, H, W) normalised images to (N, C, H / stride, W / stride).

        With `high_res_chans`, C is `out_chans` and four times those, a 2x2 block of finer features to
        each token.
        """
        levels = [
            # Some timm backbones hand out channels-last features.
            level if level.shape[1] == c else level.permute(0, 3, 1, 2)
            for level, c in zip(
                self._features(images), self.backbone.feature_info.channels(), strict=True
            )
        ]
        if self.high_res_neck is None:
            return self.neck(levels)
        embedding = self.neck(levels[1:])
        high_res = self.high_res_neck(levels[0], embedding)
        return torch.cat([embedding, F.pixel_unshuffle(high_res, 2)], dim=1)

    def _features(self, images: Tensor) -> list[Tensor]:
        if not isinstance(self.backbone, FeatureHookNet) or torch.compiler.is_compiling():
            return self.backbone(images)
        with _HOOKED:
            return self.backbone(images)


def _size_arguments(name: str, img_size: int, pretrain_img_size: int) -> dict[str, Any]:
    """The size for those that must be told, and leave to take any other for those that can."""
    with torch.device("meta"):
        known = inspect.signature(type(timm.create_model(name))).parameters
    if "dynamic_img_size" in known:
        return {"img_size": pretrain_img_size, "dynamic_img_size": True}
    return {"img_size": img_size} if "img_size" in known else {}


@torch.no_grad()
def _start_biases_off_zero(backbone: nn.Module) -> None:
    """Gives convolutions with zero biases PyTorch's own uniform ones.

    Over zero padding, a zero bias leaves nothing but zeros to a layer norm, which multiplies the
    gradient by 1 / sqrt(eps) = 1000, and the next one again: first gradient norms of 1e9 were seen.
    """
    for layer in backbone.modules():
        if not isinstance(layer, nn.Conv2d) or layer.bias is None or layer.bias.is_meta:
            continue
        if not layer.bias.any():
            bound = layer.weight[0].numel() ** -0.5
            nn.init.uniform_(layer.bias, -bound, bound)


def _start_at_fan_in(backbone: nn.Module) -> None:
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


def _check_img_size(img_size: int, stride: int) -> None:
    if img_size % stride:
        raise ValueError(f"img_size must be a multiple of the stride {stride}, got {img_size}")
