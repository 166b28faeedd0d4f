"""What is done in each state of a round. Each part may be done again: it finds what is there, or makes the same.

A part returns what the round is to remember, or what it waits for.
"""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data_engine.engine import Engine
from data_engine.filters import UselessModelError
from data_engine.mask_store.claims import StoreClaims
from data_engine.measure import measure
from data_engine.plan import Step
from data_engine.plan_check import stage_node
from data_engine.records import Model, Round
from data_engine.report import write_report
from data_engine.retrain import check_metric, judged, retrain, train_detector
from data_engine.shard_claims import Share
from data_engine.shard_plan import planned
from data_engine.shard_writer import ShardManifest, finished
from data_engine.shards_of_round import SHARDS, Labelled, note_shards, write_round, write_shards
from data_engine.stages.fully_automatic import Generated, generate
from sam_train import config
from sam_train.training import run_lock

log = logging.getLogger(__name__)

IMAGES = "images"
"""Folder of a round: the images that its automatic stage is to label, as shards, while it does."""
WORKERS = "workers"
"""Folder of a round: who is at it, of this machine."""
MOST_WORKERS = 1000


class Waiting(NamedTuple):
    """A round cannot go on by itself now."""

    reason: str


Outcome = Mapping[str, Any] | Waiting


def measure_start(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Measures the model that the round works with, where nobody has yet."""
    model = engine.model_of(round_)
    if not model.metrics:
        model = measured(engine, model)
        engine.store.put_model(model)
    check_metric(engine, model)  # before people work, not after the training
    return {}


def make_detector(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Trains the box detector, unless boxes come from elsewhere."""
    if step.detector_boxes is not None:
        return {}
    return {"detector": train_detector(engine, round_, step).id}


def export_masks(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Writes the accepted masks as shards."""
    manifests = write_round(engine, round_)
    return {
        "images": sum(one.images for one in manifests),
        "masks": sum(one.masks for one in manifests),
    }


def stage_images(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Puts the images of an automatic round into shards."""
    untouched = engine.store.untouched_images(before_round=round_.number)
    images = list(islice(untouched, step.num_images))
    manifests = write_shards(
        engine.round_folder(round_.number) / IMAGES,
        round_.stage,
        (Labelled(image, ()) for image in images),
        images_per_shard=int(engine.settings["images_per_shard"]),
        made_with={"round": round_.number},
    )
    if not manifests:
        raise ValueError(
            f"round {round_.number} has no image to label: all are held out or labelled; register more "
            "with data-engine register, or take the step out of plan.steps"
        )
    return {"images": sum(one.images for one in manifests)}


def generate_masks(engine: Engine, round_: Round, step: Step) -> Outcome:
    """The automatic stage, as far as this process can."""
    num_workers = int(engine.settings["num_workers"])
    done = generate_share(
        engine, round_, step, worker=int(engine.settings["worker"]), num_workers=num_workers
    )
    if done.num_open:
        return Waiting(f"{done.num_open} shards of other workers: data-engine generate makes them")
    return {"stage": stage_node(engine.settings, step)}


def generate_share(
    engine: Engine, round_: Round, step: Step, *, worker: int = 0, num_workers: int = 1
) -> Generated:
    """A worker's share of the automatic stage.

    Raises:
        UselessModelError, ValueError, OSError: see `AutomaticStage.run`.
    """
    folder = engine.round_folder(round_.number)
    with _own_name(folder / WORKERS, worker) as holder:
        claims = StoreClaims(engine.store, holder, clock=engine.clock)
        share = Share(worker=worker, num_workers=num_workers, claims=claims)
        return _generate(engine, round_, step, folder, share)


def _generate(engine: Engine, round_: Round, step: Step, folder: Path, share: Share) -> Generated:
    try:
        return generate(
            stage_node(engine.settings, step),
            checkpoint=str(engine.path(engine.model_of(round_).path)),
            shards=str(folder / IMAGES),
            out=folder / SHARDS,
            round_number=round_.number,
            share=share,
            device=str(engine.settings["device"]),
        )
    except UselessModelError:
        shutil.rmtree(folder / SHARDS)  # no mask is lost, and other thresholds may be tried
        raise


@contextmanager
def _own_name(folder: Path, worker: int) -> Iterator[str]:
    """A name that no other process of this machine claims shards by.

    After a crash it is the same one again: what was held then is still its own.
    """
    for number in range(MOST_WORKERS):
        name = f"{socket.gethostname()}-{worker}-{number}"
        with ExitStack() as stack:
            try:
                stack.enter_context(run_lock.held(folder / name))
            except ValueError:
                continue
            yield name
            return
    raise ValueError(f"{MOST_WORKERS} workers with worker={worker} are at it on this machine")


def note_generated(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Tells the store of the automatic shards; the images that they were made of are theirs now."""
    folder = engine.round_folder(round_.number)
    gone = [name for name in planned(folder / SHARDS) if finished(folder / SHARDS / name) is None]
    if gone and (folder / IMAGES).is_dir():
        generate_share(engine, round_, step)
    elif gone:
        raise FileNotFoundError(
            f"{folder / SHARDS / gone[0]} is gone or damaged, and its automatic masks are nowhere else: put it "
            "back and call again"
        )
    manifests = _finished_shards(folder / SHARDS)
    note_shards(engine, round_, manifests, "automatic")
    for left in (IMAGES, WORKERS):
        shutil.rmtree(folder / left, ignore_errors=True)
    return {"masks": sum(one.masks for one in manifests)}


def train(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Retrains, where the plan says so."""
    model = retrain(engine, round_, step) if step.trains else None
    return {"trained": None if model is None else model.id}


def measure_new(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Measures what was trained, and promotes it or not."""
    model = engine.store.model(str(round_.config.get("trained")))
    if model is None:
        return {}
    return {"promoted": judged(engine, measured(engine, model), engine.model_of(round_)).promoted}


def report(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Writes the round's report."""
    write_report(
        engine.store, engine.root, round_.number, config.instantiate(engine.settings["report"])
    )
    return {}


def measured(engine: Engine, model: Model) -> Model:
    """A model with its metrics on the held-out images, not stored yet."""
    folder = engine.path(model.path).parent.parent / "eval" / model.id[:12]
    return replace(model, metrics=measure(engine, model, folder))


def _finished_shards(folder: Path) -> list[ShardManifest]:
    def found() -> Iterator[ShardManifest]:
        for path in sorted(folder.glob("*.tar")):
            if (manifest := finished(path)) is not None:
                yield manifest

    return list(found())
