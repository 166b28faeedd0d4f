"""Folders and hub names of `transformers`' `SamModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from sam_train.checkpoints.files import (
    READABLE,
    WEIGHT_SUFFIXES,
    CheckpointError,
    load_json,
    load_safetensors,
    load_torch_file,
)

# What our model computes whatever a config.json says: another value is refused, not ignored.
_FIXED: dict[str, Any] = {
    "model_type": "sam",
    "vision_config.hidden_act": "gelu",
    "vision_config.layer_norm_eps": 1e-6,
    "vision_config.qkv_bias": True,
    "vision_config.use_abs_pos": True,
    "vision_config.use_rel_pos": True,
    "prompt_encoder_config.hidden_act": "gelu",
    "prompt_encoder_config.layer_norm_eps": 1e-6,
    "prompt_encoder_config.num_point_embeddings": 4,
    "mask_decoder_config.hidden_act": "relu",
}


def download(name: str) -> Path:
    """The folder of a hub model such as `facebook/sam-vit-base`, from the cache or the network."""
    try:
        patterns = ["*config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"{name} is no file here, and as a Hugging Face model it is neither in the cache nor within "
            f"reach: {str(error).splitlines()[0]}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    if not (folder / "config.json").is_file():
        inside = sorted(
            str(path)
            for path in (*folder.glob("*"), *folder.glob("checkpoints/*"))
            if path.suffix in WEIGHT_SUFFIXES
        )
        hint = f"did you mean {', '.join(inside[:5])}?" if inside else READABLE
        raise CheckpointError(f"the folder {folder} has no config.json; {hint}")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            # Bare names only: the index is as little to be trusted as the rest.
            parts = {Path(part).name for part in load_json(index).get("weight_map", {}).values()}
            return [folder / part for part in sorted(parts)]
    raise CheckpointError(f"the folder {folder} has a config.json but no model.safetensors")


def load_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of a model's files, by `SamModel`'s names."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though the index beside it names it")
        tensors.update(
            load_safetensors(path) if path.suffix == ".safetensors" else load_torch_file(path)
        )
    return tensors


def load_settings(folder: Path) -> dict[str, Any]:
    """What the tensors cannot tell: arguments of our two-way transformer, from the config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"the config.json that belongs to the weights is missing in {folder}")
    settings = load_json(path)
    for name, expected in _FIXED.items():
        got = _look_up(settings, name, expected)
        if got != expected:
            raise CheckpointError(f"{path}: expected {name} to be {expected!r}, got {got!r}")
    return {
        "num_heads": _look_up(settings, "mask_decoder_config.num_attention_heads", 8),
        # transformers has 1e-6 here, where the published model has torch's 1e-5.
        "layer_norm_eps": _look_up(settings, "mask_decoder_config.layer_norm_eps", 1e-6),
    }


def load_pixel_statistics(folder: Path) -> dict[str, list[float]]:
    """`Sam`'s pixel_mean and pixel_std, where the folder says how pictures are normalised."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            settings = load_json(folder / name)
            settings = settings.get("image_processor", settings)
            scale = settings.get("rescale_factor") or 1 / 255
            return {
                ours: [round(value / scale, 4) for value in settings[theirs]]
                for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std"))
                if isinstance(settings.get(theirs), list)
            }
    return {}


def _look_up(settings: dict[str, Any], name: str, default: Any) -> Any:
    *groups, key = name.split(".")
    for group in groups:
        settings = settings.get(group) or {}
    return settings.get(key, default)
