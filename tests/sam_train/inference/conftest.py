"""Pictures, real ones where they are at hand, and the published predictor beside ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import segment_anything
import torch

from sam_train.checkpoints.load import load_model
from sam_train.data.sa1b import ShardSource
from sam_train.inference.predictor import SamPredictor

Picture = Callable[[int, int], np.ndarray]


class Pair(NamedTuple):
    """Two predictors with the same weights."""

    published: Any
    ours: SamPredictor


@pytest.fixture
def picture() -> Picture:
    """`picture(height, width)`: soft random shapes in colour, uint8 RGB."""

    def draw(height: int, width: int) -> np.ndarray:
        coarse = np.random.default_rng(height).integers(0, 256, (6, 8, 3), np.uint8)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)

    return draw


@pytest.fixture
def real_images(shared_data: Path) -> Callable[[str, int], list[np.ndarray]]:
    """The first validation images of a real set."""

    def read(name: str, count: int) -> list[np.ndarray]:
        if not (shared_data / name).is_dir():
            pytest.skip(f"REAL DATA MISSING: {shared_data / name}")
        source = ShardSource(path=str(shared_data / name / "val-*.tar"))
        records = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
        return [record.image for record, _ in zip(records, range(count), strict=False)]

    return read


@pytest.fixture
def balanced_sam(published_sam: Callable[..., Any], picture: Picture) -> Any:
    """The published toy SAM with random weights, shifted so that its masks are neither empty nor full."""
    model = published_sam(seed=1)
    upscaled = []
    hook = model.mask_decoder.output_upscaling.register_forward_hook(
        lambda module, inputs, output: upscaled.append(output)
    )
    predictor = segment_anything.SamPredictor(model)
    predictor.set_image(picture(96, 128))
    point = np.array([[50, 40]]), np.array([1])
    logits = np.concatenate(
        [predictor.predict(*point, multimask_output=several)[2] for several in (False, True)]
    )
    hook.remove()
    mean = upscaled[0].mean(dim=(0, 2, 3))
    with torch.no_grad():
        for mlp, own in zip(model.mask_decoder.output_hypernetworks_mlps, logits, strict=True):
            mlp.layers[-1].bias -= float(np.median(own)) * mean / mean.square().sum()
    return model


@pytest.fixture
def pair(balanced_sam: Any, tmp_path: Path) -> Pair:
    """The published predictor and ours, on random weights of the official format."""
    published = balanced_sam
    torch.save(published.state_dict(), tmp_path / "official.pth")
    ours = load_model(tmp_path / "official.pth")
    return Pair(segment_anything.SamPredictor(published), SamPredictor(ours))
