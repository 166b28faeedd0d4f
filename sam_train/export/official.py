"""The `.pth` of `segment_anything`, or of MobileSAM for a TinyViT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.sam_keys import OFFICIAL_VIT
from sam_train.checkpoints.sam_sizes import SamSizes
from sam_train.checkpoints.save import at_running_size, save_official
from sam_train.models.image_encoder import TinyVitEncoder
from sam_train.models.sam import Sam

_BY_WIDTH = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_VIT_T_WIDTH = 320
_PUBLISHED_EPS = 1e-5


@dataclass(frozen=True)
class OfficialExport:
    """Writes the official file."""

    is_folder: ClassVar[bool] = False
    owned: ClassVar[tuple[str, ...]] = ()

    def write(self, model: Sam, out: Path) -> list[str]:
        """Writes the file and returns a report, a line each.

        Raises:
            ValueError: the published code cannot express the model.
        """
        save_official(model, out)
        lines = [f"{out.name}: {out.stat().st_size / 1e6:.1f} MB", *how_to_load(model)]
        eps = model.mask_decoder.transformer.layer_norm_eps
        if eps != _PUBLISHED_EPS:
            lines.append(
                f"The decoder's layer norms have an epsilon of {eps} here and of {_PUBLISHED_EPS} in "
                "the published code whatever the file says: answers agree to about 1e-5"
            )
        return lines


def how_to_load(model: Sam) -> list[str]:
    """The call of the published package that takes the file, where it has one for these sizes."""
    if isinstance(model.image_encoder, TinyVitEncoder):
        if model.image_encoder.backbone.num_features == _VIT_T_WIDTH:
            return ['mobile_sam.sam_model_registry["vit_t"](checkpoint=PATH)']
        return ["MobileSAM's classes, built by hand for this width of TinyViT"]
    state = at_running_size(model)
    sizes = SamSizes("the model", OFFICIAL_VIT, state).config()
    name = _BY_WIDTH.get(sizes["image_encoder"]["embed_dim"])
    if name is not None:
        with torch.device("meta"):
            published = build_model(model_config(f"sam_{name}")).state_dict()
        if {key: value.shape for key, value in published.items()} == {
            key: value.shape for key, value in state.items()
        }:
            return [f'segment_anything.sam_model_registry["{name}"](checkpoint=PATH)']
    return [
        "No entry of segment_anything's registry has these sizes: docs/export.md shows how its classes "
        f"are built by hand, here with {_arguments(sizes)}"
    ]


def _arguments(sizes: dict[str, Any]) -> str:
    """The sizes by the names of the published constructors."""
    encoder, decoder = sizes["image_encoder"], sizes["mask_decoder"]
    parts = {
        "ImageEncoderViT": (
            encoder,
            "img_size patch_size in_chans embed_dim depth num_heads mlp_ratio "
            "out_chans window_size global_attn_indexes",
        ),
        "PromptEncoder": (sizes["prompt_encoder"], "embed_dim mask_in_chans"),
        "MaskDecoder": (
            decoder,
            "transformer_dim num_multimask_outputs iou_head_depth iou_head_hidden_dim",
        ),
        "TwoWayTransformer": (
            decoder["transformer"],
            "depth embedding_dim mlp_dim num_heads attention_downsample_rate",
        ),
    }
    return ", ".join(
        f"{name}({', '.join(f'{key}={values[key]}' for key in keys.split())})"
        for name, (values, keys) in parts.items()
    )
