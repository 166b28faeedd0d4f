"""Where an engine stands, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_engine.annotation import still_open
from data_engine.engine import Engine
from data_engine.records import Model, Round
from data_engine.round_numbers import is_simulated

DONE = "done"
SHOWN = ("mean_iou@1", "mean_iou@3", "box_mean_iou", "average_recall@100")


def describe(engine: Engine) -> str:
    """Images, rounds, models, and what comes next."""
    store = engine.store
    lines = [
        f"{engine.root}: {store.num_images(held_out=False)} images, "
        f"{store.num_images(held_out=True)} held out, {store.num_masks()} masks of "
        f"{_workers(store.annotators())}, "
        f"{sum(one.num_masks for one in store.shards(source='automatic'))} automatic"
    ]
    lines += [summary(engine, one) for one in store.rounds()]
    lines.append(next_call(engine))
    return "\n".join(lines)


def summary(engine: Engine, round_: Round) -> str:
    """One round: what it made, and the model that came of it."""
    parts = [f"round {round_.number} {round_.stage}: {round_.state}"]
    if round_.stage != "automatic":
        counts = engine.store.count_tasks(round=round_.number)
        by = engine.store.annotators(round=round_.number)
        who = f", by {_workers(by)}" if is_simulated(tuple(by)) else ""
        parts.append(f"tasks {_listed(counts) or 'not made yet'}{who}")
    if "masks" in round_.config:
        parts.append(f"{round_.config['masks']} masks on {round_.config['images']} images")
    parts += [describe_model(one) for one in engine.models() if one.round == round_.number]
    return "; ".join(parts)


def next_call(engine: Engine) -> str:
    """What the engine waits for, and the call that goes on."""
    last = engine.current_round()
    call = f"data-engine round root={engine.root}"
    if last is None or last.state == DONE:
        place = 0 if last is None else last.plan_step + 1
        if place >= len(engine.steps):
            return "The plan has no further step."
        return f"Next: step {place + 1} of {len(engine.steps)}, {engine.steps[place].stage}. {call}"
    if last.state == "annotating":
        waiting = still_open(engine.store.count_tasks(round=last.number))
        if waiting:
            return (
                f"Waits for annotators: {waiting} tasks of round {last.number}. {call} then goes on; with "
                "annotator=simulated it does them itself"
            )
    return f"Round {last.number} is at {last.state}. {call} goes on"


def describe_model(model: Model) -> str:
    """Its id and its scores on the held-out images."""
    metrics = [f"{name} {model.metrics[name]:.3f}" for name in SHOWN if name in model.metrics]
    promoted = "" if model.promoted else " (not promoted)"
    return f"model {model.id[:12]}{promoted} {', '.join(metrics)}".rstrip()


def _workers(names: Sequence[str]) -> str:
    """What these annotators are, in one word or two: figures of simulated ones are not those of people."""
    simulated = [is_simulated((name,)) for name in names]
    if not any(simulated):
        return "people"
    return "simulated annotators" if all(simulated) else "people and simulated annotators"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
