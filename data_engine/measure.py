"""How good a model is on the held-out images: simulated clicks, and how many objects it finds alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_engine.engine import Engine
from data_engine.images import ADVICE, ImageGoneError
from data_engine.records import Image, Model, Rle
from data_engine.shards_of_round import Labelled, write_shards
from data_engine.truth import UnknownTruthError
from sam_train import cli_common, config
from sam_train.checkpoints.load import load_model
from sam_train.convert.manifest import MANIFEST
from sam_train.data.sa1b import ShardSource
from sam_train.evaluation.click_benchmark import ClickBenchmark
from sam_train.evaluation.proposals import ProposalBenchmark
from sam_train.models.sam import Sam
from sam_train.ops import rle
from sam_train.structures import Annotation

log = logging.getLogger(__name__)

HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The protocols that a model goes through.

    Attributes:
        clicks, proposals: `conf/protocol/`; None leaves one out.
    """

    clicks: ClickBenchmark | None
    proposals: ProposalBenchmark | None

    def run(
        self, model: Sam, held_out: ShardSource, folder: Path, checkpoint: str = ""
    ) -> dict[str, float]:
        """Measures a model; what was measured in the folder before is not measured again.

        Args:
            model: in eval mode.
            held_out: images and their masks.
            folder: gets a folder of each protocol, with pictures.
            checkpoint: what the model is called, for the record.

        Returns:
            `mean_iou@1` and so on, `box_mean_iou`, `average_recall@100` ...
        """
        found: dict[str, float] = {}
        for name, protocol in (("clicks", self.clicks), ("proposals", self.proposals)):
            if protocol is not None:
                where = folder / name
                found |= _known(where) or dict(
                    protocol.run(model, held_out, where, checkpoint=checkpoint)["metrics"]
                )
        return found


def measure(engine: Engine, model: Model, folder: Path) -> dict[str, float]:
    """Measures a model of the engine; nothing where no held-out image has known masks."""
    if (held_out := held_out_shards(engine)) is None:
        return {}
    protocols = config.instantiate(engine.settings["measure"])
    cli_common.prepare_host()
    device = cli_common.device(str(engine.settings["device"]))
    loaded = load_model(engine.path(model.path), device=device)
    source = ShardSource(path=str(held_out), name=HELD_OUT)
    return dict(protocols.run(loaded, source, folder, f"{model.path} {model.id}"))


def held_out_shards(engine: Engine) -> Path | None:
    """The folder of the held-out images and their masks, which is made where it is not there yet."""
    folder = engine.root / HELD_OUT
    if not (folder / MANIFEST).is_file():
        write_shards(
            folder,
            HELD_OUT,
            _with_truth(engine),
            images_per_shard=int(engine.settings["images_per_shard"]),
            made_with={"stage": HELD_OUT},
        )
    return folder if (folder / MANIFEST).is_file() else None


def _with_truth(engine: Engine) -> Iterator[Labelled]:
    for image in engine.store.images(held_out=True):
        if masks := [one for one in _truth(engine, image) if rle.area(one)]:
            yield Labelled(
                image,
                [
                    Annotation(id=0, rle=one, bbox=rle.bbox(one), area=rle.area(one))
                    for one in masks
                ],
            )


def _truth(engine: Engine, image: Image) -> Sequence[Rle]:
    try:
        return engine.truth(image)
    except UnknownTruthError as error:
        log.warning("held out, and not measured on: %s", error)
        return ()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ImageGoneError(f"{image.path} cannot be read ({reason}); {ADVICE}") from None


def _known(folder: Path) -> dict[str, Any] | None:
    """The metrics that a protocol wrote last of all."""
    try:
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return dict(content["metrics"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
