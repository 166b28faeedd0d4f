"""`sam_model_registry`: published models by name, as code written for segment_anything asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.load import load_weights
from sam_train.models.sam import Sam

Builder = Callable[..., Sam]


def _builder(name: str) -> Builder:
    def build(checkpoint: str | Path | None = None) -> Sam:
        model = build_model(model_config(name))
        if checkpoint is not None:
            load_weights(model, checkpoint)
        return model.eval()

    build.__doc__ = f"""`conf/model/{name}.yaml` in eval mode.

    Args:
        checkpoint: weights of exactly this model, in any format `load_model` takes; None leaves them
            random.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it holds another model; `load_model` finds out which by itself.
    """
    return build


build_sam_vit_h = _builder("sam_vit_h")
build_sam_vit_l = _builder("sam_vit_l")
build_sam_vit_b = _builder("sam_vit_b")
build_sam_vit_t = _builder("mobile_sam")

sam_model_registry: dict[str, Builder] = {
    "default": build_sam_vit_h,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "vit_t": build_sam_vit_t,
}
"""Values are called with `checkpoint=PATH`; `vit_t` is MobileSAM."""
