"""`sam_model_registry` gives the published models by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import segment_anything
import torch

from sam_train import config
from sam_train.checkpoints.files import CheckpointError
from sam_train.inference.model_registry import sam_model_registry
from sam_train.models.image_encoder import TinyVitEncoder


def test_the_names_are_the_published_ones_and_mobile_sam() -> None:
    assert sam_model_registry.keys() == {*segment_anything.sam_model_registry, "vit_t"}
    assert sam_model_registry["default"] is sam_model_registry["vit_h"]


def test_weights_of_another_model_are_refused(tmp_path: Path, published_sam) -> None:
    torch.save(published_sam().state_dict(), tmp_path / "small.pth")
    with pytest.raises(CheckpointError, match="small.pth does not fit"):
        sam_model_registry["vit_t"](checkpoint=tmp_path / "small.pth")


def test_a_name_gives_its_model_ready_to_answer() -> None:
    model = sam_model_registry["vit_t"]()
    assert isinstance(model.image_encoder, TinyVitEncoder) and not model.training
    assert model.image_encoder.img_size == 1024


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_the_names_stand_for_the_published_sizes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        ours = config.instantiate(config.compose("train", [f"model=sam_{name}"]).model)
        published = segment_anything.sam_model_registry[name]()
    count = sum(parameter.numel() for parameter in published.parameters())
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
