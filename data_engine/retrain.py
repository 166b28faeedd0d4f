"""Training between the rounds: `sam-train` with what was labelled so far, in a process of its own.

After the start only the engine's own masks are trained on (SAM, section 4): all of them, those of people ten
times as often as automatic ones (appendix A), and at scales drawn anew each time, if the recipe says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from data_engine.code_version import code_version
from data_engine.engine import DETECTOR, SAM, Engine
from data_engine.measure import held_out_shards
from data_engine.model_files import keep_detector, keep_sam
from data_engine.plan import PARENT, Step
from data_engine.records import Model, Round, Shard
from data_engine.shards_of_round import whole_shards
from sam_train import config
from sam_train.ops.files import write_atomically
from sam_train.training import run_lock

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LOCK_POLL_S = 1.0
COMMAND = "command.json"
"""File of a run folder: what was asked for, whatever the engine's folder is called."""
FORCED = "resume=force"


class Trainer(Protocol):
    """Where trainings run: here, or through a queue of jobs."""

    def run(self, command: Sequence[str], run_dir: Path) -> Path:
        """Runs a command to its end, in whatever place; one that was broken off goes on.

        Args:
            command: `sam-train` and its arguments; one of them is `run_dir=`.
            run_dir: that folder.

        Returns:
            The checkpoint that came out.

        Raises:
            ValueError: it failed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LocalTrainer:
    """Trains in a process of this machine.

    Should this process be killed, the training goes on by itself, and the next call waits for it.
    """

    def run(self, command: Sequence[str], run_dir: Path) -> Path:
        """See `Trainer`."""
        wait_until_free(run_dir)
        program, *arguments = command
        verb = program.removeprefix("sam-")
        process = subprocess.Popen([sys.executable, "-m", "sam_train.cli", verb, *arguments])
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # it saves, and goes on next time
            process.wait()
            raise
        if code:
            raise ValueError(
                f"the training in {run_dir} ended with exit code {code} (see above, and its train.log): "
                "mend that and call again, it goes on"
            )
        return trained(run_dir)


def trained(run_dir: Path) -> Path:
    """The checkpoint of a finished run: its best where it validated, else its last."""
    for name in ("best.ckpt", "last.ckpt"):
        if (path := run_dir / CHECKPOINTS / name).is_file():
            return path
    raise ValueError(f"{run_dir} is finished and holds no checkpoint: delete it and call again")


def retrain(engine: Engine, round_: Round, step: Step, *, name: str = "sam") -> Model | None:
    """Trains the segmentation model on all masks up to a round, and registers what came out.

    Args:
        engine: see there.
        round_: the last one whose masks count.
        step: says how.
        name: of the run and the checkpoint among those of the round.

    Returns:
        The model, unmeasured and not promoted; None where there is no mask to train on.
    """
    shards = [one for one in whole_shards(engine) if one.round <= round_.number and one.num_masks]
    if not shards:
        log.warning("round %d: no mask to train on yet, the model stays", round_.number)
        return None
    start = engine.path(engine.model_of(round_).path)
    checkpoint = str(start) if step.checkpoint == PARENT else step.checkpoint
    command = [
        *_command(engine, step.recipe, checkpoint),
        *_data(engine, shards, step),
        *step.overrides,
    ]
    path = engine.round_folder(round_.number) / CHECKPOINTS / f"{name}.ckpt"
    made = _run(engine, command, path.parent.parent / f"training_{name}")
    parent = round_.model_id if step.checkpoint == PARENT else None
    lineage = _lineage(engine, SAM, parent, round_, shards, command)
    return _register(engine, keep_sam(made, path, lineage), path, lineage)


def train_detector(engine: Engine, round_: Round, step: Step) -> Model:
    """Trains the box detector of a semi-automatic round on all masks of the first stage.

    Raises:
        ValueError: there are none.
    """
    shards = [one for one in whole_shards(engine) if one.source == "assisted" and one.num_masks]
    if not shards:
        raise ValueError(
            "a semi-automatic round trains its box detector on the masks of assisted rounds, and there "
            "are none: put one before it in plan.steps, or name boxes with detector_boxes: FILE"
        )
    sam = engine.model_of(round_)
    command = [
        *_command(engine, step.detector_recipe, str(engine.path(sam.path))),
        *_data(engine, shards, step),
        *step.detector_overrides,
    ]
    path = engine.round_folder(round_.number) / CHECKPOINTS / "detector.ckpt"
    made = _run(engine, command, path.parent.parent / "training_detector")
    lineage = _lineage(engine, DETECTOR, sam.id, round_, shards, command)
    return _register(engine, keep_detector(made, path, lineage), path, lineage)


def judged(engine: Engine, model: Model, before: Model) -> Model:
    """A measured model, promoted or not, as the store now has it.

    Args:
        engine: `promote` of its settings decides, and `promote_by` is the metric.
        model: measured.
        before: the one that it would take the place of.
    """
    rule, metric = engine.settings["promote"], engine.settings["promote_by"]
    check_metric(engine, model)
    if model.id == before.id:
        log.warning("model %s: the training changed nothing", model.id[:12])
        return before
    new, old = model.metrics.get(metric), before.metrics.get(metric)
    is_worse = new is not None and old is not None and new < old
    promoted = rule == "always" or (rule == "better" and not is_worse)
    model = replace(model, promoted=promoted)
    engine.store.put_model(model)
    said = "" if new is None or old is None else f" ({metric} {old:.3f} before, {new:.3f} now)"
    if promoted:
        log.info("model %s is promoted%s", model.id[:12], said)
    else:
        log.warning(
            "model %s is not promoted%s: the next round works with %s; data-engine retrain root=%s "
            "promote_model=%s takes it all the same",
            *(model.id[:12], said, before.id[:12], engine.root, model.id[:12]),
        )
    return model


def check_metric(engine: Engine, model: Model) -> None:
    """Sees that what models are compared by was measured, if anything was.

    Raises:
        ValueError: it was not.
    """
    metric = engine.settings["promote_by"]
    if model.metrics and metric not in model.metrics:
        raise ValueError(
            f"promote_by={metric} was not measured; there is {', '.join(sorted(model.metrics))}: mend it in "
            f"{engine.root / 'engine.yaml'}"
        )


def _command(engine: Engine, recipe: str, checkpoint: str | None) -> list[str]:
    start = [] if checkpoint is None else [f"checkpoint={checkpoint}"]
    own = engine.settings.get("config_dir")
    recipes = [] if own is None else ["--config-dir", str(own)]
    seed = f"seed={engine.settings['seed']}"
    return ["sam-train", f"experiment={recipe}", *recipes, *start, seed]


def _data(engine: Engine, shards: Sequence[Shard], step: Step) -> list[str]:
    """What tells sam-train the shards to train on; those held out are named, and not looked at by default."""
    human = [one for one in shards if one.source != "automatic"]
    automatic = [one for one in shards if one.source == "automatic"]
    held_out = held_out_shards(engine)
    watched = [] if held_out is None else ["trainer.limit_val_batches=0"]
    if not human or not automatic:
        val = [] if held_out is None else [f"data.val_path={held_out}"]
        return ["data=shards", f"data.path={_folders(engine, shards)}", *val, *watched]
    arguments = ["data=rounds"]
    weights = {"human": step.human_weight, "automatic": 1.0}
    for name, own in (("human", human), ("automatic", automatic)):
        num_images = sum(one.num_images for one in own)
        arguments += [
            f"data.sets.{name}.path={_folders(engine, own)}",
            f"data.weights.{name}={weights[name] * num_images:g}",
        ]
        arguments += [] if held_out is None else [f"data.sets.{name}.val_path={held_out}"]
    return [*arguments, *watched]


def _folders(engine: Engine, shards: Sequence[Shard]) -> str:
    """The folders of shards, each of which holds shards of one round and source, as a list for Hydra."""
    folders = sorted({str(engine.path(one.path).parent) for one in shards})
    return f"[{','.join(folders)}]"


def _run(engine: Engine, command: list[str], run_dir: Path) -> Path:
    command.append(f"run_dir={run_dir}")
    trainer: Trainer = config.instantiate(engine.settings["training"])
    return trainer.run([*command, *_resumed(engine, command, run_dir)], run_dir)


def _resumed(engine: Engine, command: Sequence[str], run_dir: Path) -> list[str]:
    """What lets a training go on in a folder that was moved; notes what is trained there.

    Raises:
        ValueError: another training was broken off there.
    """
    path = run_dir / COMMAND
    said = json.dumps(_portable(engine, command), indent=1) + "\n"
    try:
        before = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        write_atomically(path, said)
        return []
    if before == said or FORCED in command:
        return [] if FORCED in command else [FORCED]
    raise ValueError(
        f"{run_dir} holds a training that was begun otherwise ({path} says how): delete that folder to "
        f"begin anew, or add {FORCED} to the overrides of the step to go on with it"
    )


def _portable(engine: Engine, command: Sequence[str]) -> list[str]:
    """A command without the place of the engine's folder."""
    return [argument.replace(f"{engine.root}/", "") for argument in command]


def _lineage(
    engine: Engine,
    kind: str,
    parent: str | None,
    round_: Round,
    shards: Sequence[Shard],
    command: Sequence[str],
) -> dict[str, Any]:
    """Fields of a `Model`: what it was made from, with and by."""
    sums = json.dumps(sorted(one.sha256 for one in shards))
    return {
        "parent": parent,
        "round": round_.number,
        "trained_on": [one.path for one in shards],
        "data_fingerprint": hashlib.sha256(sums.encode()).hexdigest(),
        "config": {"kind": kind, "command": _portable(engine, command)},
        "code_version": code_version(),
    }


def _register(engine: Engine, made_id: str, path: Path, lineage: Mapping[str, Any]) -> Model:
    known = engine.store.model(made_id)
    if known is not None and known.round != lineage["round"]:  # the training changed nothing
        return known
    fields = {**lineage, "trained_on": tuple(lineage["trained_on"])}
    model = Model(id=made_id, path=engine.relative(path), created_at=engine.clock(), **fields)
    engine.store.put_model(model)
    return model


def wait_until_free(run_dir: Path) -> None:
    """Waits for a training that an engine which was killed has left running."""
    is_told = False
    while True:
        try:
            with run_lock.held(run_dir):
                return
        except ValueError as error:
            if not is_told:
                log.info("%s; waiting for it", str(error).split(":")[0])
            is_told = True
            time.sleep(LOCK_POLL_S)
