"""The third stage: the model alone labels shards of images (SAM, sections 4 and 5, appendix B)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_engine.filters import Limits
from data_engine.shard_claims import Share
from data_engine.shard_plan import open_plan
from data_engine.stages.automatic_labels import Labeller
from data_engine.stages.shard_worker import Worker
from sam_train import cli_common, config
from sam_train.checkpoints.load import load_model
from sam_train.inference.automatic import AutomaticSegmenter
from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from sam_train.models.fingerprint import model_id
from sam_train.models.sam import Sam

DECISIVE = ("generator", "tile_px", "tile_overlap_px", "before", "quality")
"""What of the stage's settings decides what is in the shards."""


class Generated(NamedTuple):
    """What a worker did.

    Attributes:
        num_images, num_masks, num_damaged: in shards that it made.
        num_shards: that it made.
        num_before: of its share, that were finished before.
        num_open: that are not finished: other workers'.
        out: where all is.
    """

    num_images: int
    num_masks: int
    num_damaged: int
    num_shards: int
    num_before: int
    num_open: int
    out: Path

    def __str__(self) -> str:
        parts = [f"{self.num_images} images, {self.num_masks} masks in {self.num_shards} shards"]
        if self.num_damaged:
            parts.append(f"{self.num_damaged} damaged images are left out, the manifests name them")
        if self.num_before:
            parts.append(f"{self.num_before} shards were done before")
        if self.num_open:
            parts.append(f"{self.num_open} are still open, with other workers")
        return f"{'; '.join(parts)}\nSee {self.out}; sam-convert check={self.out} verifies it"


@dataclass(frozen=True, kw_only=True)
class AutomaticStage:
    """Shards of images in, shards of the same images with the model's masks out.

    Attributes:
        generator: builds the mask generator for a model: a node of `conf/preset/`.
        tile_px, tile_overlap_px: see `AutomaticSegmenter`.
        before: what an image goes through before the model sees it, (H, W, 3) uint8 RGB to the same: here
            a user's code blurs faces and plates. Images are then written as it returns them.
        quality: of a JPEG that is so written.
        limits: when the model's answers are worth nothing.
        max_bad_fraction: of images that may be damaged.
    """

    generator: Callable[..., SamAutomaticMaskGenerator]
    tile_px: int | None = 5000
    tile_overlap_px: int = 1000
    before: Callable[[np.ndarray], np.ndarray] | None = None
    quality: int = 95
    limits: Limits = field(default_factory=Limits)
    max_bad_fraction: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is in [0, 1], got {self.max_bad_fraction}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is in [1, 100], got {self.quality}")

    def run(
        self,
        model: Sam,
        shards: str | Sequence[str],
        out: Path,
        *,
        settings: Mapping[str, Any],
        round_number: int = 0,
        share: Share | None = None,
    ) -> Generated:
        """Makes what is missing of a worker's share; see `shard_writer` for what is written.

        Args:
            model: in eval mode.
            shards: of images, as `ShardSource` takes them; their JSON may be absent, its masks are not
                looked at.
            out: the folder of the new ones.
            settings: this stage's node as plain values, for the manifests and to tell other work apart.
            round_number: of the data engine.
            share: the worker's; None: all.

        Raises:
            FileNotFoundError: there are no shards.
            InputShardError: some cannot be read; all others are finished.
            UnusableSourceError: too many images are damaged.
            UselessModelError: the model finds nothing, or everything.
            ValueError: `out` holds something else; `before` returns no such image.
            OSError: nothing can be written there.
        """
        model_name = model_id(model)
        made_with = {
            "model": model_name,
            "round": round_number,
            "stage": {name: settings[name] for name in DECISIVE if name in settings},
        }
        plan = open_plan(out, shards, made_with)
        segmenter = AutomaticSegmenter(model, self.generator, self.tile_px, self.tile_overlap_px)
        labeller = Labeller(
            segmenter=segmenter,
            before=self.before,
            quality=self.quality,
            limits=self.limits,
            model=model_name,
            round_number=round_number,
        )
        worker = Worker(labeller, plan, out, share or Share(), self.max_bad_fraction)
        num_before = sum(shard.name in worker.done for shard in worker.own)
        worker.run()
        return Generated(
            num_images=sum(manifest.images for manifest in worker.made),
            num_masks=sum(manifest.masks for manifest in worker.made),
            num_damaged=sum(len(manifest.damaged) for manifest in worker.made),
            num_shards=len(worker.made),
            num_before=num_before,
            num_open=len(plan.shards) - len(worker.done),
            out=out,
        )


def generate(
    stage: Mapping[str, Any],
    *,
    checkpoint: str,
    shards: str | Sequence[str],
    out: Path,
    round_number: int = 0,
    share: Share | None = None,
    device: str = "auto",
    img_size: int | None = None,
) -> Generated:
    """`data-engine generate`: the stage from its node and a checkpoint.

    Args:
        stage: `conf/stage/automatic.yaml` as plain values, its preset filled in.
        checkpoint: as `load_model` takes it.
        shards, out, round_number, share: see `AutomaticStage.run`, which also says what may go wrong.
        device: cpu, cuda, cuda:1 or auto.
        img_size: another side of the model input.
    """
    built = config.instantiate(stage)
    cli_common.prepare_host()
    model = load_model(checkpoint, device=cli_common.device(device), img_size=img_size)
    return built.run(model, shards, out, settings=stage, round_number=round_number, share=share)
