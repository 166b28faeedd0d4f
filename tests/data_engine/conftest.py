"""Shards of small images, and the automatic stage made small: the built-in weights, a grid of 4 x 4 points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sam_train import config
from sam_train.checkpoints.load import load_model
from sam_train.convert.tar_writer import TarWriter
from sam_train.data.shards import encode_record
from sam_train.models.sam import Sam
from sam_train.structures import ImageRecord

WriteShard = Callable[..., Path]

SMALL = [
    *("images=none", "+stage=automatic", "preset=sam_tiny", "preset.points_per_side=4"),
    *("preset.pred_iou_thresh=0.2", "preset.stability_score_thresh=0.4"),
]


@pytest.fixture(scope="session")
def built_in_sam() -> Sam:
    """The model of the weights that are built in."""
    return load_model("sam_tiny")


@pytest.fixture
def write_shard(synthetic_scenes: Sequence[ImageRecord]) -> WriteShard:
    """`write_shard(path, num_images)`: scenes with their masks; `masks=False` leaves the JSON out."""

    def write(path: Path, num_images: int = 3, *, masks: bool = True, first: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        tar = TarWriter(path)
        for number in range(first, first + num_images):
            scene = synthetic_scenes[number % len(synthetic_scenes)]
            files = encode_record(scene, image_id=1000 + number)
            if not masks:
                del files["json"]
            tar.add(f"{path.stem}_{number}", files)
        tar.finish()
        return path

    return write


@pytest.fixture
def stage_node() -> Callable[..., dict[str, Any]]:
    """`stage_node("limits.judged_after=2", ...)`: the stage's node as the command would have it."""

    def node(*overrides: str) -> dict[str, Any]:
        cfg = config.compose("segment", [*SMALL, *overrides])
        return config.plain(cfg.stage, resolve=True)

    return node
