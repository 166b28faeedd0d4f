"""A run's folder: what it holds, and whether a configuration may start, go on or is done there.

.hydra/config.yaml      the configuration, interpolations unresolved, so that it compares across machines
checkpoints/last.ckpt   where the run goes on from; previous.ckpt, the one before, if that is damaged
metrics.csv             a row a log step
metrics.json            written last: it marks the run as finished
train.log               what the terminal showed, and tracebacks
.lock                   while a process trains here: see run_lock.py
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from sam_train.ops.files import DamagedFileError, check_whole, write_atomically

log = logging.getLogger(__name__)

CONFIG = Path(".hydra") / "config.yaml"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
PREVIOUS_CHECKPOINT = Path("checkpoints") / "previous.ckpt"
METRICS = Path("metrics.csv")
RESULT = Path("metrics.json")

# Where and how a run is carried out, not what it learns: these may differ when it goes on.
IGNORED = (
    "run_dir",
    "resume",
    "doctor",
    "estimate",
    "estimate_tflops",
    "paths",
    "logger",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "data.num_workers",
)
MAX_DIFFERENCES = 20
ABSENT = object()


class Action(Enum):
    """What to do in a run folder."""

    START = "start"
    RESUME = "resume"
    FINISHED = "finished"


@dataclass(frozen=True)
class RunState:
    """What a run folder holds.

    Attributes:
        config: the configuration of the run that made it, None for a folder without one.
        last_checkpoint: where to go on from, None before the first checkpoint.
        result: the final metrics of a finished run, else None.
    """

    config: Mapping[str, Any] | None = None
    last_checkpoint: Path | None = None
    result: Mapping[str, Any] | None = None


def inspect(folder: Path) -> RunState:
    """Reads a run folder, which need not exist."""
    return RunState(
        config=_read_config(folder / CONFIG),
        last_checkpoint=next(iter(_checkpoints(folder)), None),
        result=_read_result(folder / RESULT),
    )


def decide(folder: Path, state: RunState, config: Mapping[str, Any], *, resume: str) -> Action:
    """Whether the run described by `config` starts, goes on or is done in `folder`.

    An attempt that reached neither a checkpoint nor a result holds nothing to lose: its folder is free.

    Args:
        folder: for the messages.
        state: what the folder holds.
        config: of the run that is asked for.
        resume: "auto", or "force" to go on with another configuration.

    Raises:
        ValueError: the folder holds another run, and `resume` is not "force".
    """
    if resume not in ("auto", "force"):
        raise ValueError(f"resume is auto or force, got {resume}")
    if state.last_checkpoint is None and state.result is None:
        return Action.START
    changes = [] if state.config is None else differences(state.config, config)
    if resume != "force":
        if state.config is None:
            raise ValueError(
                f"{folder} holds checkpoints or metrics of a run but not its {CONFIG}, so nothing says what "
                "was run there; choose another run_dir=PATH, or go on there with resume=force"
            )
        if changes:
            raise ValueError(_refusal(folder, changes))
    if state.result is not None and not changes:
        return Action.FINISHED
    return Action.RESUME if state.last_checkpoint else Action.START


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What `here` changes of the configuration `there`, one line a name, but for `IGNORED`."""
    old, new = dict(leaves(there)), dict(leaves(here))
    return [
        f"{name}: {_show(old.get(name, ABSENT))} there, {_show(new.get(name, ABSENT))} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ABSENT) != new.get(name, ABSENT) and not is_ignored(name)
    ]


def prepare(folder: Path, config: Mapping[str, Any], action: Action) -> None:
    """Makes the folder, sees that it can be written, and records the configuration.

    A fresh start clears what an attempt that never reached a checkpoint left behind; a run that goes
    on is unfinished until it writes its result again.

    Raises:
        OSError: the folder cannot be made or written.
    """
    try:
        for unfinished in (folder / LAST_CHECKPOINT).parent.glob(".*.ckpt.*"):
            unfinished.unlink(missing_ok=True)  # of a run that was killed while it saved
        write_atomically(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
        (folder / RESULT).unlink(missing_ok=True)
        if action is Action.START:
            (folder / METRICS).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"the run folder {folder} cannot be written ({reason}); choose another with run_dir=PATH"
        ) from error


def newest_whole_checkpoint(folder: Path) -> Path:
    """The checkpoint to go on from, read through; `previous.ckpt` takes the place of a damaged `last.ckpt`.

    Raises:
        DamagedFileError: none of them is whole.
    """
    reasons = []
    for path in _checkpoints(folder):
        try:
            check_whole(path)
        except DamagedFileError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            log.warning("%s: going on from %s, the one before", reason, path)
        last = folder / LAST_CHECKPOINT
        if path != last:
            # Or the next save would keep the damaged one as the one before.
            with contextlib.suppress(FileNotFoundError):  # another process did
                path.replace(last)
        return last
    raise DamagedFileError(
        f"{'; '.join(reasons)}. There is no other to go on from: delete the folder, or choose another "
        "run_dir=PATH"
    )


def keep_previous(last: Path) -> None:
    """Gives the last checkpoint its second name, `previous.ckpt`, before another takes the first."""
    if not last.exists():
        return
    unfinished = last.with_name(f".{PREVIOUS_CHECKPOINT.name}.link")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(last, unfinished)
    except OSError:  # a file system without links
        shutil.copyfile(last, unfinished)
    unfinished.replace(last.with_name(PREVIOUS_CHECKPOINT.name))
    unfinished.unlink(missing_ok=True)  # where both were one file, replacing does nothing


def _checkpoints(folder: Path) -> list[Path]:
    paths = [folder / LAST_CHECKPOINT, folder / PREVIOUS_CHECKPOINT]
    return [path for path in paths if path.is_file()]


def finish(folder: Path, result: Mapping[str, Any]) -> None:
    """Marks the run as finished by writing its final `metrics.json`."""
    write_atomically(folder / RESULT, json.dumps(result, indent=2) + "\n")


def _refusal(folder: Path, changes: list[str]) -> str:
    shown = changes[:MAX_DIFFERENCES]
    if len(changes) > len(shown):
        shown.append(f"... and {len(changes) - len(shown)} more")
    lines = "\n".join(f"  {line}" for line in shown)
    return (
        f"{folder} holds a run with another configuration:\n{lines}\n"
        "Choose another run_dir=PATH, go on there with this configuration by resume=force, or delete the folder."
    )


def _read_config(path: Path) -> Mapping[str, Any] | None:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} is not a readable configuration; choose another run_dir"
        ) from error
    return config if isinstance(config, dict) else None


def _read_result(path: Path) -> Mapping[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(
            f"{path} is not readable; delete it, and the run goes on from its last checkpoint"
        ) from error


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted name."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def is_ignored(name: str) -> bool:
    """Whether a setting says where and how a run is carried out, not what it learns."""
    return any(name == key or name.startswith(f"{key}.") for key in IGNORED)


def _show(value: Any) -> str:
    return "absent" if value is ABSENT else json.dumps(value)
