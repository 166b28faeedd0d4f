"""Model files of the engine: weights, what they are of and where they come from, without the state of a training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_engine.shard_writer import clear
from sam_train.checkpoints.detector import load_detector
from sam_train.checkpoints.formats import RECORD_KEY, checkpoint_payload, read_checkpoint
from sam_train.checkpoints.load import load_model
from sam_train.models.fingerprint import model_id, tensors_id
from sam_train.ops.files import write_atomically

LINEAGE_KEY = "lineage"
"""The key under which a file says what it was made from, with and by; readers of weights pass it over."""


def keep_sam(checkpoint: str | Path, path: Path, lineage: Mapping[str, Any]) -> str:
    """Copies a Sam, of any format that `load_model` takes.

    Args:
        checkpoint: to be copied.
        path: of the copy.
        lineage: plain values, kept in it.

    Returns:
        Its id.

    Raises:
        FileNotFoundError, CheckpointError: as `load_model` does.
        OSError: the copy cannot be written.
    """
    model = load_model(checkpoint)
    content = {
        RECORD_KEY: checkpoint_payload(read_checkpoint(checkpoint).config),
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        LINEAGE_KEY: dict(lineage),
    }
    _write(path, content)
    return model_id(model)


def keep_detector(checkpoint: str | Path, path: Path, lineage: Mapping[str, Any]) -> str:
    """The same of a box detector that sam-train wrote."""
    detector = load_detector(checkpoint)
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    kept = {name: content[name] for name in (RECORD_KEY, "state_dict")}
    _write(path, kept | {LINEAGE_KEY: dict(lineage)})
    return tensors_id(detector.state_dict(), type(detector).__name__)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    clear(path)  # of a process that was killed while it wrote: as large as the model
    write_atomically(path, partial(torch.save, dict(content)))
