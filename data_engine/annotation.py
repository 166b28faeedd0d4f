"""The part of people in a round: their tasks, and who does them where nobody is there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_engine.embeddings import Embeddings
from data_engine.engine import Engine
from data_engine.mask_store.rows import chunks
from data_engine.plan import Step
from data_engine.plan_check import stage_node
from data_engine.records import Image, Round, Task
from data_engine.round_parts import Outcome, Waiting
from data_engine.simulated_annotator import FIRST_NAME, SimulatedAnnotator, WorkDone
from data_engine.stages.assisted import AssistedStage, Look
from data_engine.stages.semi_automatic import (
    BoxSource,
    CocoBoxes,
    DetectorBoxes,
    SemiAutomaticStage,
)
from sam_train import cli_common, config
from sam_train.checkpoints.detector import load_detector
from sam_train.checkpoints.load import load_model
from sam_train.inference.predictor import SamPredictor

log = logging.getLogger(__name__)

TASKS_AT_ONCE = 32
"""Tasks are put on the desk in such lots: those of a lot under way are lost with the process."""


def hand_out(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Puts the tasks of a round on the desk, and encodes their images ahead; goes on where it was."""
    images = _images(engine, round_, step)
    predictor = predictor_of(engine, round_)
    known = {task.image_id for task in engine.store.tasks(round=round_.number, stage=round_.stage)}
    missing = [image for image in images if image.id not in known]
    ahead = Embeddings(embeddings_folder(engine, round_), predictor)
    look = ahead.set_and_keep if engine.settings["embeddings_ahead"] else None
    for lot in chunks(_tasks(engine, round_, step, missing, predictor, look), TASKS_AT_ONCE):
        engine.desk.add_tasks(lot)
        log.info("round %d: %d tasks more", round_.number, len(lot))
    if engine.settings["embeddings_ahead"]:
        ahead.ahead(images)
    return {"tasks": len(images), "stage": stage_node(engine.settings, step)}


def annotate(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Waits until the tasks are done; does them where a simulated annotator is asked for."""
    if engine.settings.get("annotator") is not None:
        simulate(engine, round_, str(round_.stage))
    waiting = still_open(engine.store.count_tasks(round=round_.number))
    if waiting:
        return Waiting(f"{waiting} tasks of {round_.stage} that annotators have not done")
    shutil.rmtree(embeddings_folder(engine, round_), ignore_errors=True)
    simulated = engine.settings.get("annotator")
    return {} if simulated is None else {"annotator": simulated}


def still_open(counts: Mapping[str, int]) -> int:
    """Tasks that are to be done yet."""
    return counts.get("open", 0) + counts.get("leased", 0)


def simulate(
    engine: Engine, round_: Round, stage: str, names: Sequence[str] = (FIRST_NAME,)
) -> WorkDone:
    """Does the tasks of a stage as simulated annotators, one after the other.

    Raises:
        UnknownTruthError: of an image; the tasks before are handed in.
    """
    settings = config.instantiate(engine.settings["annotator"])
    predictor = predictor_of(engine, round_)
    done = WorkDone()
    for name in names:
        annotator = SimulatedAnnotator(
            engine.desk,
            engine.store,
            engine.truth,
            predictor,
            settings,
            name=name,
            model_id=round_.model_id,
            embeddings=Embeddings(embeddings_folder(engine, round_), predictor),
        )
        done += annotator.work(stage)  # type: ignore[arg-type]
    return done


def predictor_of(engine: Engine, round_: Round) -> SamPredictor:
    """A predictor of the model that a round works with."""
    cli_common.prepare_host()
    device = cli_common.device(str(engine.settings["device"]))
    return SamPredictor(load_model(engine.path(engine.model_of(round_).path), device=device))


def embeddings_folder(engine: Engine, round_: Round) -> Path:
    """Where the images of a round are kept encoded while people work on them."""
    return engine.round_folder(round_.number) / "embeddings"


def _images(engine: Engine, round_: Round, step: Step) -> list[Image]:
    """The images of a round: those with a task, and of the others, by their hashes, as many as are to be.

    Raises:
        ValueError: there is none.
    """
    tasks = engine.store.tasks(round=round_.number, stage=round_.stage)
    chosen = engine.store.images_by_id([task.image_id for task in tasks])
    others = engine.store.untouched_images(before_round=round_.number)
    new = (image for image in others if image.id not in chosen)
    number = None if step.num_images is None else max(0, step.num_images - len(chosen))
    images = [*chosen.values(), *islice(new, number)]
    if not images:
        raise ValueError(
            f"round {round_.number} has no image to label: all are held out or labelled; add some with "
            f"data-engine register root={engine.root} images=..., or take the step out of plan.steps"
        )
    return images


def _tasks(
    engine: Engine,
    round_: Round,
    step: Step,
    images: Sequence[Image],
    predictor: SamPredictor,
    look: Look | None,
) -> Iterator[Task]:
    stage: Any = config.instantiate(stage_node(engine.settings, step))
    if isinstance(stage, AssistedStage):
        return stage.tasks(round_.number, images, predictor, look)
    assert isinstance(stage, SemiAutomaticStage)
    boxes = _boxes(engine, round_, step, images, predictor)
    return stage.tasks(round_.number, images, predictor, boxes, round_.model_id, look)


def _boxes(
    engine: Engine, round_: Round, step: Step, images: Sequence[Image], predictor: SamPredictor
) -> BoxSource:
    if step.detector_boxes is not None:
        given = CocoBoxes(step.detector_boxes)
        given.check(images)
        return given
    detector = engine.store.model(str(round_.config["detector"]))
    assert detector is not None
    return DetectorBoxes(load_detector(engine.path(detector.path), sam=predictor.model))
