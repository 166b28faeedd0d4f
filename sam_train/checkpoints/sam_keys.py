"""The names of a SAM's weights: ours beside those of other software, in tables read both ways.

`{}` stands for a number. What follows a row's names (`.weight`, ...) is the same on both sides, and the
first row that fits counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

Row = tuple[str, str]


@dataclass(frozen=True)
class KeyTable:
    """Our names (left) and those of one file format (right).

    Attributes:
        rows: pairs of name templates.
        left_out: tensors of the format that feed no mask, so that our model does without them.
        copies: names under which the format may store a tensor a second time, and the name it has first.
    """

    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)

    def ours(self, name: str) -> str | None:
        """Our name of the format's tensor, or None where it has none."""
        return _translate(name, self._from_theirs)

    def theirs(self, name: str) -> str | None:
        """The format's name of our tensor, or None where it has none."""
        return _translate(name, self._from_ours)

    @cached_property
    def _from_theirs(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(theirs), ours) for ours, theirs in self.rows]

    @cached_property
    def _from_ours(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(ours), theirs) for ours, theirs in self.rows]


def _pattern(template: str) -> re.Pattern[str]:
    number = r"(\d+)"
    return re.compile(
        number.join(re.escape(part) for part in template.split("{}")) + r"((?:\..+)?)"
    )


def _translate(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            *numbers, tail = match.groups()
            return template.format(*numbers) + tail
    return None


_PROMPTS_AND_DECODER: tuple[Row, ...] = (
    ("prompt_encoder", "prompt_encoder"),
    ("mask_decoder", "mask_decoder"),
)

OFFICIAL_VIT = KeyTable(
    (
        ("image_encoder.backbone.blocks.{}.mlp.fc{}", "image_encoder.blocks.{}.mlp.lin{}"),
        ("image_encoder.backbone", "image_encoder"),
        *_PROMPTS_AND_DECODER,
    )
)
"""`segment_anything`'s ViT-B, L and H, and MedSAM."""

_TINY, _VIT_T = "image_encoder.backbone", "image_encoder"

MOBILE_SAM = KeyTable(
    (
        (f"{_TINY}.patch_embed.conv1.conv", f"{_VIT_T}.patch_embed.seq.0.c"),
        (f"{_TINY}.patch_embed.conv1.bn", f"{_VIT_T}.patch_embed.seq.0.bn"),
        (f"{_TINY}.patch_embed.conv2.conv", f"{_VIT_T}.patch_embed.seq.2.c"),
        (f"{_TINY}.patch_embed.conv2.bn", f"{_VIT_T}.patch_embed.seq.2.bn"),
        # A merging ends their stage and begins ours.
        (f"{_TINY}.stages.1.downsample.conv{{}}.conv", f"{_VIT_T}.layers.0.downsample.conv{{}}.c"),
        (f"{_TINY}.stages.1.downsample", f"{_VIT_T}.layers.0.downsample"),
        (f"{_TINY}.stages.2.downsample.conv{{}}.conv", f"{_VIT_T}.layers.1.downsample.conv{{}}.c"),
        (f"{_TINY}.stages.2.downsample", f"{_VIT_T}.layers.1.downsample"),
        (f"{_TINY}.stages.3.downsample.conv{{}}.conv", f"{_VIT_T}.layers.2.downsample.conv{{}}.c"),
        (f"{_TINY}.stages.3.downsample", f"{_VIT_T}.layers.2.downsample"),
        (
            f"{_TINY}.stages.{{}}.blocks.{{}}.conv{{}}.conv",
            f"{_VIT_T}.layers.{{}}.blocks.{{}}.conv{{}}.c",
        ),
        (
            f"{_TINY}.stages.{{}}.blocks.{{}}.local_conv.conv",
            f"{_VIT_T}.layers.{{}}.blocks.{{}}.local_conv.c",
        ),
        (f"{_TINY}.stages.{{}}.blocks", f"{_VIT_T}.layers.{{}}.blocks"),
        ("image_encoder.neck", "image_encoder.neck"),
        *_PROMPTS_AND_DECODER,
    ),
    # TinyViT's classifier, which MobileSAM stores and never calls.
    left_out=(
        "image_encoder.norm_head.weight",
        "image_encoder.norm_head.bias",
        "image_encoder.head.weight",
        "image_encoder.head.bias",
    ),
)
"""MobileSAM's `vit_t`."""

SAM_TRAIN = KeyTable(
    tuple((part, f"model.{part}") for part in ("image_encoder", "prompt_encoder", "mask_decoder"))
)
"""This project's `.ckpt`, where the model is an attribute of the training module."""


def hugging_face(iou_head_depth: int) -> KeyTable:
    """The table of `transformers`' `SamModel`.

    Args:
        iou_head_depth: layers of the head that predicts each mask's IoU; the first and the last have
            names of their own there.
    """
    block = ("image_encoder.backbone.blocks.{}", "vision_encoder.layers.{}")
    layer = "mask_decoder.transformer.layers.{}"
    return KeyTable(
        (
            ("image_encoder.backbone.pos_embed", "vision_encoder.pos_embed"),
            (
                "image_encoder.backbone.patch_embed.proj",
                "vision_encoder.patch_embed.projection",
            ),
            (f"{block[0]}.norm{{}}", f"{block[1]}.layer_norm{{}}"),
            (f"{block[0]}.mlp.fc{{}}", f"{block[1]}.mlp.lin{{}}"),
            (f"{block[0]}.attn", f"{block[1]}.attn"),
            ("image_encoder.backbone.neck.0", "vision_encoder.neck.conv1"),
            ("image_encoder.backbone.neck.1", "vision_encoder.neck.layer_norm1"),
            ("image_encoder.backbone.neck.2", "vision_encoder.neck.conv2"),
            ("image_encoder.backbone.neck.3", "vision_encoder.neck.layer_norm2"),
            (
                "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
                "shared_image_embedding.positional_embedding",
            ),
            ("prompt_encoder.point_embeddings.{}", "prompt_encoder.point_embed.{}"),
            ("prompt_encoder.not_a_point_embed", "prompt_encoder.not_a_point_embed"),
            ("prompt_encoder.no_mask_embed", "prompt_encoder.no_mask_embed"),
            ("prompt_encoder.mask_downscaling.0", "prompt_encoder.mask_embed.conv1"),
            ("prompt_encoder.mask_downscaling.1", "prompt_encoder.mask_embed.layer_norm1"),
            ("prompt_encoder.mask_downscaling.3", "prompt_encoder.mask_embed.conv2"),
            ("prompt_encoder.mask_downscaling.4", "prompt_encoder.mask_embed.layer_norm2"),
            ("prompt_encoder.mask_downscaling.6", "prompt_encoder.mask_embed.conv3"),
            ("mask_decoder.iou_token", "mask_decoder.iou_token"),
            ("mask_decoder.mask_tokens", "mask_decoder.mask_tokens"),
            (f"{layer}.norm{{}}", f"{layer}.layer_norm{{}}"),
            (f"{layer}.self_attn", f"{layer}.self_attn"),
            (f"{layer}.cross_attn_token_to_image", f"{layer}.cross_attn_token_to_image"),
            (f"{layer}.cross_attn_image_to_token", f"{layer}.cross_attn_image_to_token"),
            (f"{layer}.mlp", f"{layer}.mlp"),
            (
                "mask_decoder.transformer.final_attn_token_to_image",
                "mask_decoder.transformer.final_attn_token_to_image",
            ),
            (
                "mask_decoder.transformer.norm_final_attn",
                "mask_decoder.transformer.layer_norm_final_attn",
            ),
            ("mask_decoder.output_upscaling.0", "mask_decoder.upscale_conv1"),
            ("mask_decoder.output_upscaling.1", "mask_decoder.upscale_layer_norm"),
            ("mask_decoder.output_upscaling.3", "mask_decoder.upscale_conv2"),
            *_hugging_face_mlp("mask_decoder.output_hypernetworks_mlps.{}", 3),
            *_hugging_face_mlp("mask_decoder.iou_prediction_head", iou_head_depth),
        ),
        # Tied to the other in the model; older files hold both.
        copies={
            "prompt_encoder.shared_embedding.positional_embedding": (
                "shared_image_embedding.positional_embedding"
            )
        },
    )


def _hugging_face_mlp(name: str, depth: int) -> list[Row]:
    inner = [(f"{name}.layers.{i}", f"{name}.layers.{i - 1}") for i in range(1, depth - 1)]
    return [
        (f"{name}.layers.0", f"{name}.proj_in"),
        *inner,
        (f"{name}.layers.{depth - 1}", f"{name}.proj_out"),
    ]
