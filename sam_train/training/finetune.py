"""Which parts of a model are trained, and which stay as they came."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)

FROZEN_PARTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "decoder": ("image_encoder",),
    "mask_decoder": ("image_encoder", "prompt_encoder"),
    "medsam": ("prompt_encoder",),
}
"""The parts that each mode leaves as they are."""
PLANNED = ("lora", "adapter")


def freeze(model: Any, mode: str) -> None:
    """Takes the parts that a mode does not train out of training.

    Their weights get no gradients, so that nothing is kept for them, and they run as in evaluation,
    without drop path or dropout; Lightning leaves each part in the mode that it finds. What a frozen
    encoder computes is never recomputed.

    Args:
        model: has the parts as attributes.
        mode: one of `FROZEN_PARTS`.

    Raises:
        ValueError: the mode is unknown, or not built yet.
    """
    if mode in PLANNED:
        raise ValueError(
            f"finetune={mode} is not built yet; expected one of {', '.join(FROZEN_PARTS)}"
        )
    if mode not in FROZEN_PARTS:
        raise ValueError(f"expected finetune={'|'.join(FROZEN_PARTS)}, got {mode}")
    for name in FROZEN_PARTS[mode]:
        part = getattr(model, name, None)
        if part is None:
            raise ValueError(
                f"finetune={mode} keeps the {name}, which this model has not: say full"
            )
        part.requires_grad_(False).eval()
        backbone: Any = getattr(part, "backbone", None)
        if hasattr(backbone, "set_grad_checkpointing"):
            getattr(backbone, "model", backbone).set_grad_checkpointing(False)
