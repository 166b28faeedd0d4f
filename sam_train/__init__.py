"""The public names, each loaded when it is first asked for; nothing inside the package imports from here."""

import importlib
from typing import Any

_WHERE = {
    "load_model": "sam_train.checkpoints.load",
    "sam_model_registry": "sam_train.inference.model_registry",
    "SamAutomaticMaskGenerator": "sam_train.inference.automatic_mask_generator",
    "SamPredictor": "sam_train.inference.predictor",
    "show_masks": "sam_train.ops.show_masks",
}
_PLANNED = {
    "MedSAMPredictor",
    "build_sam2",
    "build_sam2_video_predictor",
    "SAM2ImagePredictor",
}


def __getattr__(name: str) -> Any:
    if name in _PLANNED:
        raise ImportError(f"sam_train.{name} is not built yet; its name is taken")
    if name not in _WHERE:
        raise AttributeError(f"module 'sam_train' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
