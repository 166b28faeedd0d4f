"""What an image encoder or a model is, in a short text: the same text, the same embeddings or answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sam_train.models.sam import Sam


class HasEncoder(Protocol):
    """A Sam, or what else has its image encoder and shows it images as a Sam does."""

    image_encoder: Any
    pixel_mean: Tensor
    pixel_std: Tensor


def encoder_id(model: HasEncoder) -> str:
    """32 hexadecimal digits of the encoder's weights, its input size and its normalisation."""
    return _digest(model, dict(model.image_encoder.state_dict()))


def model_id(model: Sam) -> str:
    """The same of the whole model: the same text, the same answers."""
    return _digest(model, dict(model.state_dict()))


def tensors_id(tensors: Mapping[str, Tensor], kind: str = "") -> str:
    """The same of tensors by name, and of what they are the weights of."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(kind.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(model: HasEncoder, tensors: dict[str, Tensor]) -> str:
    encoder = model.image_encoder
    tensors |= {"pixel_mean": model.pixel_mean, "pixel_std": model.pixel_std}
    return tensors_id(tensors, f"{type(encoder).__name__} {encoder.img_size}")


def embedding_shape(model: Sam) -> tuple[int, int, int]:
    """(C, h, w) of one image's embedding, fine features included."""
    encoder = model.image_encoder
    chans = encoder.out_chans + 4 * getattr(encoder, "high_res_chans", 0)
    return chans, *model.prompt_encoder.image_embedding_size
