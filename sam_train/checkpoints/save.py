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

from sam_train.checkpoints.build import build_model
from sam_train.checkpoints.sam_keys import MOBILE_SAM, OFFICIAL_VIT, KeyTable, hugging_face
from sam_train.checkpoints.sam_sizes import SamSizes, pixel_statistics
from sam_train.models.image_encoder import SamVitEncoder, TinyVitEncoder
from sam_train.models.mask_decoder import MaskDecoder
from sam_train.models.prompt_encoder import PromptEncoder
from sam_train.models.sam import SAM_PIXEL_MEAN, SAM_PIXEL_STD, Sam
from sam_train.models.two_way_transformer import TwoWayTransformer
from sam_train.ops.files import write_atomically

_IMAGENET_CLASSES = 1000
_MOBILE_SAM_SIZE = 1024
PREPROCESSOR_CONFIG = "preprocessor_config.json"


def to_official_state_dict(model: Sam) -> dict[str, Tensor]:
    """The weights by `segment_anything`'s names, or MobileSAM's for a TinyViT.

    Positions are interpolated to the size that the model runs at. The published code has 8 heads and a
    layer-norm epsilon of 1e-5 in the decoder whatever the file says.

    Raises:
        ValueError: the published code cannot express the model; the message gives every reason.
    """
    is_tiny_vit = isinstance(model.image_encoder, TinyVitEncoder)
    problems = [] if is_tiny_vit else _foreign_encoder(model)
    problems += _foreign_parts(model)
    if is_tiny_vit and model.image_encoder.img_size != _MOBILE_SAM_SIZE:
        problems.append(
            f"runs a TinyViT at {_MOBILE_SAM_SIZE} px alone, got {model.image_encoder.img_size} "
            f"(export with img_size={_MOBILE_SAM_SIZE})"
        )
    if getattr(model.mask_decoder.transformer, "num_heads", 8) != 8:
        problems.append(
            f"has 8 heads in the mask decoder, got {model.mask_decoder.transformer.num_heads}"
        )
    problems += _foreign_statistics(model)
    _refuse("official", problems)
    if is_tiny_vit:
        return _renamed(model, MOBILE_SAM) | _mobile_sam_classifier(model.image_encoder)
    return _renamed(model, OFFICIAL_VIT)


def save_official(model: Sam, path: str | Path) -> None:
    """Writes the `.pth` that `segment_anything` (or MobileSAM) loads."""
    state = to_official_state_dict(model)
    write_atomically(Path(path), partial(torch.save, state))


def to_hugging_face(model: Sam) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `transformers`' config.json and the weights by `SamModel`'s names.

    Raises:
        ValueError: `SamModel` cannot express the model; the message gives every reason.
    """
    problems = [*_foreign_encoder(model), *_foreign_parts(model)]
    depth = len(model.mask_decoder.iou_prediction_head.layers)
    if depth < 2:
        problems.append(f"needs an iou_head_depth of 2 or more, got {depth}")
    _refuse("Hugging Face", problems)
    return _hugging_face_config(model), _renamed(model, hugging_face(depth))


def save_hugging_face(model: Sam, folder: str | Path) -> None:
    """Writes the folder that `SamModel` and `SamProcessor` load with `from_pretrained`; config.json last."""
    config, state = to_hugging_face(model)
    write_atomically(
        Path(folder) / "model.safetensors",
        partial(save_file, state, metadata={"format": "pt"}),
    )
    for name, content in ((PREPROCESSOR_CONFIG, _preprocessor(model)), ("config.json", config)):
        write_atomically(Path(folder) / name, json.dumps(content, indent=2) + "\n")


def at_running_size(model: Sam) -> dict[str, Tensor]:
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


def _refuse(form: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"the {form} format {'; it '.join(problems)}. The onnx format has none of these limits"
        )


def _foreign_encoder(model: Sam) -> list[str]:
    encoder = model.image_encoder
    if type(encoder) is SamVitEncoder:
        return []
    return [
        f"has no place for a {type(encoder).__name__} (image_encoder; expected SAM's own ViT: "
        "model=sam_vit_b, sam_vit_tiny, ...)"
    ]


def _foreign_parts(model: Sam) -> list[str]:
    """Parts whose weights or ways the published decoder and prompt encoder do not have."""
    expected = (
        ("prompt_encoder", model.prompt_encoder, PromptEncoder),
        ("prompt_encoder.drawing", model.prompt_encoder.drawing, type(None)),
        ("mask_decoder", model.mask_decoder, MaskDecoder),
        ("mask_decoder.first_guess", model.mask_decoder.first_guess, type(None)),
        ("mask_decoder.transformer", model.mask_decoder.transformer, TwoWayTransformer),
    )
    problems = [
        f"has no place for a {type(part).__name__} ({name})"
        for name, part, kind in expected
        if type(part) is not kind
    ]
    return problems or _foreign_tensors(model)


def _foreign_tensors(model: Sam) -> list[str]:
    """Weights beyond those of a published model of the same sizes: adapters, heads of a user's own."""
    if type(model.image_encoder) not in (SamVitEncoder, TinyVitEncoder):
        return []
    state = model.state_dict()
    with torch.device("meta"):
        published = build_model(SamSizes("the model", OFFICIAL_VIT, state).config()).state_dict()
    extra = [name for name in state if name not in published]
    if not extra:
        return []
    return [f"has no place for {len(extra)} tensors: {', '.join(extra[:5])}"]


def _foreign_statistics(model: Sam) -> list[str]:
    in_chans = model.image_encoder.in_chans
    for name, usual in pixel_statistics(SAM_PIXEL_MEAN, SAM_PIXEL_STD, in_chans).items():
        values = getattr(model, name).flatten().cpu()
        if not torch.allclose(values, torch.tensor(usual)):
            return [f"does not hold {name}: expected SAM's {usual}, got {values.tolist()}"]
    return []


def _renamed(model: Sam, table: KeyTable) -> dict[str, Tensor]:
    state = {}
    for name, tensor in at_running_size(model).items():
        theirs = table.theirs(name)
        assert theirs is not None, name  # all others were refused
        state[theirs] = tensor.detach().cpu().contiguous()
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
    sizes = SamSizes("the model", OFFICIAL_VIT, at_running_size(model)).config()
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


def _preprocessor(model: Sam) -> dict[str, Any]:
    """What `SamProcessor` does to a picture: the longest side to `img_size`, normalised, padded."""
    side, low_res_side = model.image_encoder.img_size, model.low_res_size
    return {
        "processor_class": "SamProcessor",
        "image_processor_type": "SamImageProcessor",
        "do_convert_rgb": model.image_encoder.in_chans == 3,
        "do_resize": True,
        "size": {"longest_edge": side},
        "resample": 2,  # bilinear, in Pillow's numbers
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _shares_of_255(model.pixel_mean),
        "image_std": _shares_of_255(model.pixel_std),
        "do_pad": True,
        "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": low_res_side},
        "mask_pad_size": {"height": low_res_side, "width": low_res_side},
    }


def _shares_of_255(values: Tensor) -> list[float]:
    return [round(value / 255, 8) for value in values.flatten().tolist()]
