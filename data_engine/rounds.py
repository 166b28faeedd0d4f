"""The state machine: a round after the other, each part of one after the other, all of it in the store.

A part is done before the store says so, and can be done again at no harm: whenever the process ends, the next
call finds the same part and finishes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from data_engine.annotation import annotate, hand_out
from data_engine.code_version import code_version
from data_engine.engine import Engine, only_one
from data_engine.plan import Step
from data_engine.plan_check import check_rounds, check_steps
from data_engine.records import Model, Round
from data_engine.retrain import judged, retrain
from data_engine.round_parts import (
    Outcome,
    Waiting,
    export_masks,
    generate_masks,
    generate_share,
    make_detector,
    measure_new,
    measure_start,
    measured,
    note_generated,
    report,
    stage_images,
    train,
)
from data_engine.stages.fully_automatic import Generated

log = logging.getLogger(__name__)

DONE = "done"
Part = Callable[[Engine, Round, Step], Outcome]

TRAINING: dict[str, Part] = {"training": train, "measuring": measure_new, "reporting": report}
PARTS: dict[str, dict[str, Part]] = {
    "assisted": {
        "begun": measure_start,
        "tasks": hand_out,
        "annotating": annotate,
        "shards": export_masks,
        **TRAINING,
    },
    "semi_automatic": {
        "begun": measure_start,
        "detector": make_detector,
        "tasks": hand_out,
        "annotating": annotate,
        "shards": export_masks,
        **TRAINING,
    },
    "automatic": {
        "begun": measure_start,
        "images": stage_images,
        "generating": generate_masks,
        "shards": note_generated,
        **TRAINING,
    },
}
"""The states that a round of each stage goes through, and what is done in each; then it is `done`."""


class Progress(NamedTuple):
    """Where a call has led.

    Attributes:
        round: that it worked on; None where the plan has no further one.
        waits_for: what the round waits for; empty where it is done.
    """

    round: Round | None
    waits_for: str = ""


def run_round(engine: Engine) -> Progress:
    """Runs the next step of the plan, or goes on with the one under way, to its end or until it waits.

    Raises:
        ValueError: another process does so at this moment, or a part cannot be done; what was finished
            is kept, and the next call goes on.
    """
    with only_one(engine.root):
        round_ = current(engine)
        if round_ is None:
            return Progress(None)
        step = step_of(engine, round_)
        while round_.state != DONE:
            outcome = PARTS[round_.stage][round_.state](engine, round_, step)
            if isinstance(outcome, Waiting):
                return Progress(round_, outcome.reason)
            round_ = _moved_on(engine, round_, outcome)
        return Progress(round_)


def current(engine: Engine) -> Round | None:
    """The round under way, or the next one of the plan, begun; None where there is none.

    Raises:
        ValueError: the plan has a mistake that would come up later, after people's work say.
    """
    last = engine.current_round()
    check_rounds(engine.steps, engine.store.rounds())
    if last is not None and last.state != DONE:
        check_steps(engine.steps, engine.settings, numbers=[last.plan_step])
        return last
    place = 0 if last is None else last.plan_step + 1
    if place >= len(engine.steps):
        return None
    check_steps(engine.steps, engine.settings, numbers=[place])
    step = engine.steps[place]
    round_ = Round(
        number=1 if last is None else last.number + 1,
        stage=step.stage,
        state=next(iter(PARTS[step.stage])),
        plan_step=place,
        model_id=engine.current_model().id,
        config={"step": asdict(step), "code_version": code_version()},
        created_at=engine.clock(),
    )
    engine.store.put_round(round_)
    log.info("round %d: %s", round_.number, round_.stage)
    return round_


def step_of(engine: Engine, round_: Round) -> Step:
    """What the plan says of a round.

    Raises:
        ValueError: it does not say it any more.
    """
    check_rounds(engine.steps, [round_])
    return engine.steps[round_.plan_step]


def _moved_on(engine: Engine, round_: Round, found: Mapping[str, Any]) -> Round:
    """The round in its next state, stored."""
    states = [*PARTS[round_.stage], DONE]
    state = states[states.index(round_.state) + 1]
    finished_at = engine.clock() if state == DONE else None
    config = {**round_.config, **found}
    moved = replace(round_, state=state, config=config, finished_at=finished_at)
    engine.store.put_round(moved)
    log.info("round %d: %s", moved.number, moved.state)
    return moved


def retrain_now(engine: Engine) -> Model:
    """Trains on all masks so far, as the last round's step says, from the model that the next round would have.

    Raises:
        ValueError: there is no round or no mask yet, or the training failed.
    """
    with only_one(engine.root):
        round_ = engine.current_round()
        if round_ is None:
            raise ValueError(f"{engine.root} has no round yet, so nothing to train on")
        before = engine.current_model()
        start = replace(round_, model_id=before.id)
        others = [one for one in engine.models() if one.round == round_.number]
        name = f"sam_{len(others) + 1}"
        model = retrain(engine, start, step_of(engine, round_), name=name)
        if model is None:
            raise ValueError(f"{engine.root} has no mask to train on yet")
        return judged(engine, measured(engine, model), before)


def promote(engine: Engine, name: str) -> Model:
    """Makes a model the one that the next round works with, measured worse or not.

    Args:
        engine: see there.
        name: the first digits of its id.

    Raises:
        ValueError: no model or several are so called.
    """
    with only_one(engine.root):
        models = engine.models()
        places = [place for place, one in enumerate(models) if one.id.startswith(name)]
        if len(places) != 1:
            known = ", ".join(one.id[:12] for one in models)
            raise ValueError(f"promote_model={name} names {len(places)} models; there is: {known}")
        for later in models[places[0] + 1 :]:
            engine.store.put_model(replace(later, promoted=False))
        chosen = replace(models[places[0]], promoted=True)
        engine.store.put_model(chosen)
        return chosen


def generate_now(engine: Engine) -> Generated:
    """One worker's share of the automatic round under way; `run_round` goes on when all is there.

    Raises:
        ValueError: no such round is under way.
    """
    round_ = engine.current_round()
    if round_ is None or round_.state != "generating":
        raise ValueError(
            f"no automatic round of {engine.root} is at its shards: data-engine round root={engine.root} "
            "brings one there"
        )
    worker, num_workers = engine.settings["worker"], engine.settings["num_workers"]
    return generate_share(
        engine,
        round_,
        step_of(engine, round_),
        worker=int(worker),
        num_workers=int(num_workers),
    )
