"""Files of tensors, read so that nothing in them can run."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from sam_train.ops.quiet import quiet

READABLE = (
    "expected an official .pth file, a Hugging Face folder (config.json and model.safetensors) or hub "
    "name, or a .ckpt of this project"
)
WEIGHT_SUFFIXES = frozenset({".pth", ".pt", ".ckpt", ".safetensors", ".bin"})


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message says what was expected."""


def load_torch_file(path: Path) -> dict[Any, Any]:
    """What `torch.save` wrote, on the CPU; only tensors and plain values are unpickled."""
    with path.open("rb") as file:
        start = file.read(4)
    is_zip = start == b"PK\x03\x04"
    if not is_zip and start[:1] != b"\x80":
        what = "no checkpoint" if start else "an empty file"
        raise CheckpointError(f"{path} is {what}; {READABLE}")
    try:
        # Of pickles that are not torch's own; whether they can be read is seen by trying.
        with quiet(UserWarning):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL:? ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds more than tensors and plain values ({named[1]}), which could run code and "
                "is not loaded; save its state_dict alone"
            ) from error
        raise CheckpointError(f"{path} is damaged or no checkpoint; {READABLE}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} is damaged, cut short or no checkpoint: copy or download it again; {READABLE}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not weights; {READABLE}")
    return content


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU."""
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing, damaged or cut short: {error}") from error


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content
