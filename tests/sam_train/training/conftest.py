"""A training at toy sizes: 64 px, a narrow model, small scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_train import config
from sam_train.models.sam import Sam
from sam_train.structures import ImageBatch
from sam_train.training.interactive import InteractiveTraining

TOY = [
    "model.image_encoder.img_size=64",
    "model.image_encoder.out_chans=32",
    "model.image_encoder.backbone.depths=[1,1,1,1]",
    "model.image_encoder.backbone.dims=[16,32,32,32]",
    "model.mask_decoder.transformer.mlp_dim=64",
    "model.mask_decoder.iou_head_hidden_dim=32",
    "data.train.num_scenes=8",
    "data.train.size=64",
    "data.val.num_scenes=4",
    "data.num_workers=0",
    "data.batch_size=1",
    "data.train_transform.max_masks=2",
    "data.max_val_masks=4",
    "prompts=few",
    "prompts.num_corrections=1",
    "loss=bce_dice",
    "optim=cosine",
    "optim.schedule.warmup_steps=0",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.log_every_n_steps=1",
    "trainer.gradient_clip_val=0.1",
    "callbacks.report.num_pictures=0",
]
"""Overrides of the train configuration."""


@pytest.fixture(scope="session")
def toy() -> list[str]:
    """Overrides that make any training tiny."""
    return list(TOY)


@pytest.fixture
def make_training() -> Callable[..., InteractiveTraining]:
    """Builds the toy training, with further overrides."""

    def make(*overrides: str) -> InteractiveTraining:
        torch.manual_seed(0)
        training = config.instantiate(config.compose("train", [*TOY, *overrides]).task)
        assert isinstance(training, InteractiveTraining)
        return training

    return make


@pytest.fixture
def toy_teacher(save_model: Callable[[Sam, dict[str, Any]], Path]) -> Path:
    """A checkpoint of the toy model, with other weights than `make_training` gives it."""
    torch.manual_seed(1)
    node = config.compose("train", TOY).model
    return save_model(config.instantiate(node), config.plain(node, resolve=True))


@pytest.fixture
def blobs() -> ImageBatch:
    """Two 64 px images, one padded, with a disc and a rectangle each, brighter than the ground."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    discs = [(rows - 18) ** 2 + (columns - 44) ** 2 < 144, (rows - 30) ** 2 + columns**2 < 400]
    rectangles = [
        (rows > 36) & (rows < 58) & (columns > 6) & (columns < 30),
        (rows < 14) & (columns > 24) & (columns < 56),
    ]
    images = torch.randint(0, 60, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    for image, disc, rectangle in zip(images, discs, rectangles, strict=True):
        image[0] += 150 * disc
        image[2] += 150 * rectangle
    images[1, :, 48:] = 0
    masks = torch.stack([discs[0], rectangles[0], discs[1], rectangles[1]])
    masks[2:, 48:] = False
    return ImageBatch(
        images=images.to(torch.uint8),
        input_sizes=torch.tensor([[64, 64], [48, 64]]),
        masks=masks[:, 1::2, 1::2],
        boxes=torch.tensor([edges(mask) for mask in masks]),
        image_index=torch.tensor([0, 0, 1, 1]),
        keys=("square", "wide"),
        seeds=(3, 4),
    )


def edges(mask: torch.Tensor) -> list[float]:
    """The tight box of a mask, xyxy edges."""
    y, x = mask.nonzero().T
    return [float(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)]
