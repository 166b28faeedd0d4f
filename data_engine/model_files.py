"""Model files of the engine: weights and what they are of, without the state of a training."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from sam_train.checkpoints.detector import load_detector
from sam_train.checkpoints.formats import RECORD_KEY, checkpoint_payload, read_checkpoint
from sam_train.checkpoints.load import load_model
from sam_train.models.fingerprint import model_id, tensors_id
from sam_train.ops.files import write_atomically


def keep_sam(checkpoint: str | Path, path: Path) -> str:
    """Copies a Sam, of any format that `load_model` takes.

    Returns:
        Its id.

    Raises:
        FileNotFoundError, CheckpointError: as `load_model` does.
    """
    model = load_model(checkpoint)
    content = {
        RECORD_KEY: checkpoint_payload(read_checkpoint(checkpoint).config),
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
    }
    write_atomically(path, partial(torch.save, content))
    return model_id(model)


def keep_detector(checkpoint: str | Path, path: Path) -> str:
    """The same of a box detector that sam-train wrote."""
    detector = load_detector(checkpoint)
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    kept = {name: content[name] for name in (RECORD_KEY, "state_dict")}
    write_atomically(path, partial(torch.save, kept))
    return tensors_id(detector.state_dict(), type(detector).__name__)
