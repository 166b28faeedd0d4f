"""A SAM's sizes read off its tensors, so that a custom width or depth loads like the published ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sam_train.checkpoints.files import CheckpointError
from sam_train.checkpoints.sam_keys import KeyTable
from sam_train.models.sam import SAM_PIXEL_MEAN, SAM_PIXEL_STD

_VIT = "image_encoder.backbone"
# By last width and number of attention offsets of the last stage (its window squared).
_TINY_VITS = {
    (320, 49): "tiny_vit_5m_224",
    (448, 49): "tiny_vit_11m_224",
    (576, 49): "tiny_vit_21m_224",
    (576, 144): "tiny_vit_21m_384",
    (576, 256): "tiny_vit_21m_512",
}


@dataclass(frozen=True)
class SamSizes:
    """Reads the description of a model (the plain dict of its config node) off its tensors.

    Attributes:
        path: where they came from, for messages.
        table: names of their format, for messages.
        tensors: by our names.
    """

    path: str
    table: KeyTable
    tensors: Mapping[str, Tensor]

    def config(self) -> dict[str, Any]:
        is_tiny_vit = any(name.startswith(f"{_VIT}.stages.") for name in self.tensors)
        encoder = self._tiny_vit() if is_tiny_vit else self._vit()
        return {
            "_target_": "sam_train.models.sam.Sam",
            "image_encoder": encoder,
            "prompt_encoder": {
                "_target_": "sam_train.models.prompt_encoder.PromptEncoder",
                "embed_dim": encoder["out_chans"],
                "mask_in_chans": self._shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
            },
            "mask_decoder": self._mask_decoder(),
            **pixel_statistics(SAM_PIXEL_MEAN, SAM_PIXEL_STD, encoder["in_chans"]),
        }

    def _vit(self) -> dict[str, Any]:
        _, grid, columns, embed_dim = self._shape(f"{_VIT}.pos_embed", 4)
        _, in_chans, patch_size, _ = self._shape(f"{_VIT}.patch_embed.proj.weight", 4)
        if grid != columns:
            raise CheckpointError(
                f"{self.path}: expected positions of a square image, got {grid} x {columns}"
            )
        depth = self._count(f"{_VIT}.blocks")
        spans = [self._shape(f"{_VIT}.blocks.{i}.attn.rel_pos_h", 2)[0] for i in range(depth)]
        windows = {span for span in spans if span != 2 * grid - 1}
        return {
            "_target_": "sam_train.models.image_encoder.SamVitEncoder",
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": embed_dim // self._shape(f"{_VIT}.blocks.0.attn.rel_pos_h", 2)[1],
            "mlp_ratio": self._shape(f"{_VIT}.blocks.0.mlp.fc1.weight", 2)[0] / embed_dim,
            # A window as large as the image is the same as none.
            "global_attn_indexes": [i for i, span in enumerate(spans) if span == 2 * grid - 1],
            "window_size": (max(windows) + 1) // 2 if windows else 14,
            "img_size": grid * patch_size,
            "out_chans": self._shape(f"{_VIT}.neck.0.weight", 4)[0],
            "in_chans": in_chans,
            "patch_size": patch_size,
        }

    def _tiny_vit(self) -> dict[str, Any]:
        attention = f"{_VIT}.stages.3.blocks.0.attn"
        width = self._shape(f"{attention}.norm.weight", 1)[0]
        offsets = self._shape(f"{attention}.attention_biases", 2)[1]
        if (width, offsets) not in _TINY_VITS:
            raise CheckpointError(
                f"{self.path}: a TinyViT of last width {width} with {offsets} attention offsets is none "
                f"of {', '.join(_TINY_VITS.values())}"
            )
        return {
            "_target_": "sam_train.models.image_encoder.TinyVitEncoder",
            "name": _TINY_VITS[width, offsets],
            # No tensor tells; the published code works at this size alone.
            "img_size": 1024,
            "out_chans": self._shape("image_encoder.neck.0.weight", 4)[0],
            "in_chans": self._shape(f"{_VIT}.patch_embed.conv1.conv.weight", 4)[1],
        }

    def _mask_decoder(self) -> dict[str, Any]:
        head = "mask_decoder.iou_prediction_head.layers"
        layers = "mask_decoder.transformer.layers"
        num_tokens, dim = self._shape("mask_decoder.mask_tokens.weight", 2)
        inner = self._shape(f"{layers}.0.cross_attn_token_to_image.q_proj.weight", 2)[0]
        return {
            "_target_": "sam_train.models.mask_decoder.MaskDecoder",
            "transformer_dim": dim,
            "num_multimask_outputs": num_tokens - 1,
            "iou_head_depth": self._count(head),
            "iou_head_hidden_dim": self._shape(f"{head}.0.weight", 2)[0],
            "transformer": {
                "_target_": "sam_train.models.two_way_transformer.TwoWayTransformer",
                "depth": self._count(layers),
                "embedding_dim": dim,
                # No tensor tells; all published models have 8.
                "num_heads": 8,
                "mlp_dim": self._shape(f"{layers}.0.mlp.lin1.weight", 2)[0],
                "attention_downsample_rate": dim // inner,
            },
        }

    def _shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        stored = self.table.theirs(name) or name
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} is no whole SAM: the tensor {stored} is missing")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != num_dims or 0 in shape:
            raise CheckpointError(
                f"{self.path}: expected {stored} to have {num_dims} dimensions, got the shape {shape}"
            )
        return shape

    def _count(self, prefix: str) -> int:
        number = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        found = [int(match[1]) for name in self.tensors if (match := number.match(name))]
        if not found:
            stored = self.table.theirs(f"{prefix}.0.weight") or prefix
            raise CheckpointError(f"{self.path} is no whole SAM: tensors like {stored} are missing")
        return max(found) + 1


def pixel_statistics(
    mean: Sequence[float], std: Sequence[float], in_chans: int
) -> dict[str, list[float]]:
    """`Sam`'s pixel_mean and pixel_std for `in_chans` channels: as given, or their averages repeated."""
    if len(mean) == in_chans:
        return {"pixel_mean": list(mean), "pixel_std": list(std)}
    return {
        "pixel_mean": [sum(mean) / len(mean)] * in_chans,
        "pixel_std": [sum(std) / len(std)] * in_chans,
    }
