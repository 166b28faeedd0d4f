"""What people do in a round: their tasks, and who does them where nobody is there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_engine.engine import Engine
from data_engine.plan import Step
from data_engine.records import DrawnMask, Round, Submission
from data_engine.round_parts import Outcome, Waiting, chosen_images
from data_engine.stages.assisted import assisted_tasks
from data_engine.truth import truth

log = logging.getLogger(__name__)


def hand_out(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Puts the round's tasks on the desk."""
    images = chosen_images(engine, round_, step)
    if not images:
        raise ValueError(
            f"round {round_.number} has no image to label: all are held out or labelled; register more "
            "with data-engine init, or take the step out of plan.steps"
        )
    tasks = assisted_tasks(engine.store, round_.number, images, "prominence")
    engine.desk.add_tasks([replace(task, stage=round_.stage) for task in tasks])  # type: ignore[arg-type]
    return {"tasks": len(tasks)}


def annotate(engine: Engine, round_: Round, step: Step) -> Outcome:
    """Waits for the tasks to be done; does them where a simulated annotator is asked for."""
    if engine.settings.get("annotator") is not None:
        simulate(engine, round_)
    open_ = still_open(engine.store.count_tasks(round=round_.number))
    return (
        Waiting(f"{open_} tasks of {round_.stage} that annotators have not done") if open_ else {}
    )


def still_open(counts: Mapping[str, int]) -> int:
    """Tasks that are to be done yet."""
    return counts.get("open", 0) + counts.get("leased", 0)


def simulate(engine: Engine, round_: Round) -> Any:
    stage: Any = round_.stage
    while (task := engine.desk.next_task("simulated-0", stage=stage)) is not None:
        image = engine.store.image(task.image_id)
        masks = tuple(DrawnMask(rle=one, seconds=1.0, num_clicks=1) for one in truth(image))
        engine.desk.submit(
            Submission(
                submission_id=f"{task.id}-v1", task_id=task.id, version=task.version, masks=masks
            ),
            "simulated-0",
        )
