"""Our model to the files of other software: the same tables as for reading, the other way round."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed_nhwc
from torch import Tensor

from sam_train.checkpoints.sam_keys import MOBILE_SAM, OFFICIAL_VIT, KeyTable, hugging_face
from sam_train.checkpoints.sam_sizes import SamSizes
from sam_train.models.image_encoder import SamVitEncoder, TinyVitEncoder
from sam_train.models.sam import Sam
from sam_train.ops.files import write_atomically

_IMAGENET_CLASSES = 1000


def to_official_state_dict(model: Sam) -> dict[str, Tensor]:
    """The weights by `segment_anything`'s names, or MobileSAM's for a TinyViT.

    Positions are interpolated to the size that the model runs at. The published code has 8 heads and a
    layer-norm epsilon of 1e-5 in the decoder whatever the file says.

    Raises:
        ValueError: the published code cannot express the model.
    """
    if model.mask_decoder.transformer.num_heads != 8:
        raise ValueError(
            "the official format has 8 heads in the mask decoder, "
            f"got {model.mask_decoder.transformer.num_heads}"
        )
    _check_prompts(model, "official")
    if isinstance(model.image_encoder, TinyVitEncoder):
        return _renamed(model, MOBILE_SAM) | _mobile_sam_classifier(model.image_encoder)
    return _renamed(_checked_vit(model, "official"), OFFICIAL_VIT)


def save_official(model: Sam, path: str | Path) -> None:
    """Writes the `.pth` that `segment_anything` (or MobileSAM) loads."""
    state = to_official_state_dict(model)
    write_atomically(Path(path), partial(torch.save, state))


def to_hugging_face(model: Sam) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `transformers`' config.json and the weights by `SamModel`'s names.

    Raises:
        ValueError: `SamModel` cannot express the model.
    """
    _checked_vit(model, "Hugging Face")
    _check_prompts(model, "Hugging Face")
    depth = len(model.mask_decoder.iou_prediction_head.layers)
    if depth < 2:
        raise ValueError(
            f"the Hugging Face format needs an iou_head_depth of 2 or more, got {depth}"
        )
    return _hugging_face_config(model), _renamed(model, hugging_face(depth))


def save_hugging_face(model: Sam, folder: str | Path) -> None:
    """Writes the folder that `SamModel.from_pretrained` loads; the config.json last."""
    config, state = to_hugging_face(model)
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(
        Path(folder) / "model.safetensors",
        partial(save_file, state, metadata={"format": "pt"}),
    )
    write_atomically(Path(folder) / "config.json", text)


def _checked_vit(model: Sam, form: str) -> Sam:
    if not isinstance(model.image_encoder, SamVitEncoder):
        raise ValueError(
            f"the {form} format has no place for a {type(model.image_encoder).__name__}; "
            "expected a model with SAM's own ViT"
        )
    return model


def _check_prompts(model: Sam, form: str) -> None:
    parts = {
        "prompt_encoder.drawing": model.prompt_encoder.drawing,
        "mask_decoder.first_guess": model.mask_decoder.first_guess,
    }
    for name, part in parts.items():
        if part is not None:
            raise ValueError(
                f"the {form} format has no place for a {type(part).__name__}; "
                f"expected a model without {name}"
            )


def _renamed(model: Sam, table: KeyTable) -> dict[str, Tensor]:
    state = {}
    for name, tensor in _at_running_size(model).items():
        theirs = table.theirs(name)
        assert theirs is not None, name
        state[theirs] = tensor.detach().cpu().contiguous()
    return state


def _at_running_size(model: Sam) -> dict[str, Tensor]:
    """The weights with positions for `img_size`, where they are stored for another size."""
    state: dict[str, Tensor] = dict(model.state_dict())
    name = "image_encoder.backbone.pos_embed"
    grid = model.image_encoder.img_size // model.image_encoder.stride
    if name not in state or state[name].shape[1] == grid:
        return state
    state[name] = resample_abs_pos_embed_nhwc(state[name], [grid, grid])
    for i, block in enumerate(model.image_encoder.backbone.blocks):
        # Windows are of the same size at any size of the image.
        for axis in ("h", "w") if block.window_size == 0 else ():
            name = f"image_encoder.backbone.blocks.{i}.attn.rel_pos_{axis}"
            state[name] = F.interpolate(state[name].T[None], 2 * grid - 1, mode="linear")[0].T
    return state


def _mobile_sam_classifier(encoder: TinyVitEncoder) -> dict[str, Tensor]:
    """The unused tensors that MobileSAM's own strict loading insists on."""
    width = encoder.backbone.num_features
    values = (
        torch.ones(width),
        torch.zeros(width),
        torch.zeros(_IMAGENET_CLASSES, width),
        torch.zeros(_IMAGENET_CLASSES),
    )
    return dict(zip(MOBILE_SAM.left_out, values, strict=True))


def _hugging_face_config(model: Sam) -> dict[str, Any]:
    sizes = SamSizes("the model", OFFICIAL_VIT, _at_running_size(model)).config()
    encoder, decoder = sizes["image_encoder"], sizes["mask_decoder"]
    transformer = decoder["transformer"]
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "model_type": "sam_vision_model",
            "hidden_size": encoder["embed_dim"],
            "output_channels": encoder["out_chans"],
            "num_hidden_layers": encoder["depth"],
            "num_attention_heads": encoder["num_heads"],
            "num_channels": encoder["in_chans"],
            "image_size": encoder["img_size"],
            "patch_size": encoder["patch_size"],
            "mlp_ratio": encoder["mlp_ratio"],
            "mlp_dim": round(encoder["mlp_ratio"] * encoder["embed_dim"]),
            "window_size": encoder["window_size"],
            "global_attn_indexes": encoder["global_attn_indexes"],
            "num_pos_feats": encoder["out_chans"] // 2,
        },
        "prompt_encoder_config": {
            "model_type": "sam_prompt_encoder",
            "hidden_size": encoder["out_chans"],
            "image_size": encoder["img_size"],
            "patch_size": encoder["patch_size"],
            "image_embedding_size": encoder["img_size"] // encoder["patch_size"],
            "mask_input_channels": sizes["prompt_encoder"]["mask_in_chans"],
        },
        "mask_decoder_config": {
            "model_type": "sam_mask_decoder",
            "hidden_size": decoder["transformer_dim"],
            "mlp_dim": transformer["mlp_dim"],
            "num_hidden_layers": transformer["depth"],
            "num_attention_heads": model.mask_decoder.transformer.num_heads,
            "attention_downsample_rate": transformer["attention_downsample_rate"],
            "num_multimask_outputs": decoder["num_multimask_outputs"],
            "iou_head_depth": decoder["iou_head_depth"],
            "iou_head_hidden_dim": decoder["iou_head_hidden_dim"],
            "layer_norm_eps": model.mask_decoder.transformer.layer_norm_eps,
        },
    }
