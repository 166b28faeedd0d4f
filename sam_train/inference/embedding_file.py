"""Embeddings of the images a predictor has set, in a file that knows which encoder made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sam_train.models.fingerprint import embedding_shape, encoder_id
from sam_train.models.sam import Sam
from sam_train.ops.files import write_atomically

FORMAT_VERSION = "1"
Size = tuple[int, int]


class EmbeddingError(ValueError):
    """A file of embeddings that is damaged or not of this encoder; the message says what to do."""


def save(
    path: Path, model: Sam, features: Tensor, sizes: list[tuple[Size, Size]], *, is_batch: bool
) -> None:
    """Writes embeddings as safetensors.

    Args:
        path: of the file.
        model: whose encoder made them.
        features: (N, C, h, w).
        sizes: of each image the original (H, W) and that in the model input frame.
        is_batch: they were set as a batch, be it of one.
    """
    metadata = {
        "format": FORMAT_VERSION,
        "encoder": encoder_id(model),
        "sizes": json.dumps(sizes),
        "is_batch": json.dumps(is_batch),
    }
    tensors = {"features": features.detach().cpu().contiguous()}
    write_atomically(path, lambda place: save_file(tensors, place, metadata))


def load(path: Path, model: Sam) -> tuple[Tensor, list[tuple[Size, Size]], bool]:
    """Reads what `save` wrote, the features onto the model's device.

    Raises:
        FileNotFoundError: there is no such file.
        EmbeddingError: it is damaged, of another kind, or of another encoder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file of embeddings: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT_VERSION or "features" not in set(file.keys()):
                raise EmbeddingError(f"{path} holds no embeddings saved by a predictor")
            _check_encoder(path, metadata, model)
            features = file.get_tensor("features")
        sizes = [(_size(pair[0]), _size(pair[1])) for pair in json.loads(metadata["sizes"])]
        is_batch = bool(json.loads(metadata["is_batch"]))
    except EmbeddingError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, IndexError, ValueError) as error:
        raise EmbeddingError(f"{path} is damaged or cut short ({error}): encode anew") from error
    if features.shape != (len(sizes), *embedding_shape(model)):
        raise EmbeddingError(f"{path} is damaged: its embeddings have another shape: encode anew")
    return features.to(model.device), sizes, is_batch


def _check_encoder(path: Path, metadata: dict[str, str], model: Sam) -> None:
    expected = encoder_id(model)
    if metadata["encoder"] != expected:
        raise EmbeddingError(
            f"{path} holds embeddings of another encoder ({metadata['encoder']}) than this model's "
            f"({expected}): load the model that made them, or encode the image anew"
        )


def _size(value: Any) -> Size:
    height, width = value
    return int(height), int(width)
