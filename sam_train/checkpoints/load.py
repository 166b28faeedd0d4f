"""Any checkpoint to a ready model, or its weights into a model that is there already. Strict."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_train.checkpoints.build import build_model, check_targets, model_class
from sam_train.checkpoints.files import CheckpointError
from sam_train.checkpoints.formats import Checkpoint, read_checkpoint
from sam_train.checkpoints.sam_sizes import pixel_statistics
from sam_train.models.sam import SAM_PIXEL_MEAN, SAM_PIXEL_STD, Sam

_NAMED_AT_MOST = 20


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    img_size: int | None = None,
    in_chans: int | None = None,
) -> Sam:
    """Reads a checkpoint of any format into a model in eval mode.

    Args:
        path: an official `.pth` (SAM, MedSAM, MobileSAM), a Hugging Face folder or hub name, a
            `.ckpt` of this project, or `sam_tiny`, whose weights are built in.
        device: where the model is put.
        img_size: another side of the square input, pixels; positions are interpolated to it.
        in_chans: another number of image channels: each gets the average of the stored first
            convolution over its channels, scaled by stored / new, so that a grey image answers as it
            did; pixel_mean and pixel_std are averaged likewise.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint, or tensors are missing, unexpected or misshaped.
    """
    checkpoint = read_checkpoint(path)
    try:
        model = build_model(_adjusted(checkpoint.config, img_size, in_chans))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    _fill(model, checkpoint, inflate_channels=in_chans is not None)
    return model.to(device).eval()


def load_weights(model: nn.Module, path: str | Path, *, inflate_channels: bool = False) -> None:
    """Puts a checkpoint's weights into a model that is there already, to train on from them.

    Args:
        model: of the checkpoint's sizes; one for another input size has `pretrain_img_size` set.
        path: as for `load_model`.
        inflate_channels: let the model have another number of image channels, as `in_chans` of
            `load_model` does.
    """
    _fill(model, read_checkpoint(path), inflate_channels=inflate_channels)


def load_encoder(model: nn.Module, path: str | Path) -> None:
    """Puts a checkpoint's image encoder into a model that has one of its sizes as `image_encoder`.

    Args:
        model: whatever else it has stays as it is.
        path: as for `load_model`.
    """
    checkpoint = read_checkpoint(path)
    prefix = "image_encoder."
    expected, tensors = (
        {name: tensor for name, tensor in given.items() if name.startswith(prefix)}
        for given in (model.state_dict(), checkpoint.tensors)
    )
    if problems := _problems(checkpoint, expected, tensors):
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(tensors, strict=False)


def stored_config(path: str | Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the model that a checkpoint holds, to build it and train on.

    Args:
        path: as for `load_model`.
        changes: nested values that replace the stored ones. Positions stored for another
            `image_encoder.img_size` are interpolated to it.

    Raises:
        FileNotFoundError, CheckpointError: as for `load_model`.
    """
    checkpoint = read_checkpoint(path)
    encoder = changes.get("image_encoder") or {}
    try:
        config = _adjusted(checkpoint.config, encoder.get("img_size"), None)
        check_targets(config)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    config["image_encoder"].pop("pretrained", None)  # the weights are those of the file
    return _merged(config, changes)


def _merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for name, value in changes.items():
        stored = config.get(name)
        if isinstance(value, Mapping) and isinstance(stored, Mapping):
            value = _merged(stored, value)
        merged[name] = value
    return merged


def _adjusted(config: dict[str, Any], img_size: int | None, in_chans: int | None) -> dict[str, Any]:
    """The description of the model that is wanted, from the stored model's."""
    config = copy.deepcopy(config)
    # A choice for training: answering one image should not wait for a compiler.
    config.pop("compile_encoder", None)
    encoder = config.get("image_encoder")
    if not isinstance(encoder, dict):
        return config
    if img_size is not None:
        parameters = inspect.signature(model_class(encoder.get("_target_"))).parameters
        if "pretrain_img_size" in parameters and encoder.get("pretrain_img_size") is None:
            encoder["pretrain_img_size"] = encoder.get("img_size", img_size)
        encoder["img_size"] = img_size
    if in_chans is not None:
        encoder["in_chans"] = in_chans
        mean = config.get("pixel_mean", SAM_PIXEL_MEAN)
        std = config.get("pixel_std", SAM_PIXEL_STD)
        config.update(pixel_statistics(mean, std, in_chans))
    return config


def _fill(model: nn.Module, checkpoint: Checkpoint, *, inflate_channels: bool) -> None:
    expected = model.state_dict()
    tensors = dict(checkpoint.tensors)
    if inflate_channels:
        for name, tensor in tensors.items():
            if name in expected:
                tensors[name] = _inflated(tensor, expected[name])
    problems = _problems(checkpoint, expected, tensors)
    if problems:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(tensors)


def _inflated(stored: Tensor, wanted: Tensor) -> Tensor:
    """A first convolution's (out, in, h, w) weights for another number of channels; others as they are."""
    if stored.dim() != 4 or stored.shape[1] == wanted.shape[1]:
        return stored
    if stored.shape[:1] + stored.shape[2:] != wanted.shape[:1] + wanted.shape[2:]:
        return stored
    return stored.sum(1, keepdim=True).expand_as(wanted) / wanted.shape[1]


def _problems(
    checkpoint: Checkpoint, expected: dict[str, Tensor], tensors: dict[str, Tensor]
) -> list[str]:
    missing = [checkpoint.stored_name(name) for name in expected if name not in tensors]
    unexpected = [checkpoint.stored_name(name) for name in tensors if name not in expected]
    misshaped = {
        name: f"{checkpoint.stored_name(name)} (expected {_size(expected[name])}, got {_size(tensor)})"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    }
    kinds = {
        "missing": missing,
        "unexpected": [*checkpoint.unexpected, *unexpected],
        "misshaped": list(misshaped.values()),
    }
    problems = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if any(name.endswith("pos_embed") for name in misshaped):
        stored_size = checkpoint.config["image_encoder"].get("img_size")
        problems.append(
            "to use it at another input size, set model.image_encoder.pretrain_img_size="
            f"{checkpoint.config['image_encoder'].get('pretrain_img_size') or stored_size}"
        )
    return problems


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
