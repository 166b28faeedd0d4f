"""Kills a training again and again and compares what it ends with with an undisturbed one.

    python tests/sam_train/training/kill_runs.py --kills 20 --out outputs/kills -- experiment=nuclei ...

Prints each kill: the step the run was at, the step of its last checkpoint, and whether one was being
written. Exits 1 where anything but clock times differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sam_train import cli

TIMES = ("seconds", "time_elapsed", "start_time", "per_second")
DEADLINE_S = 1200


def train(argv: list[str], output: Path) -> None:
    """`sam-train` in a process group of its own, so that its readers die with it."""
    os.setsid()
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(cli.run("train", argv))


def started(argv: Sequence[str], run_dir: Path) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning", "sam_train.training.callbacks", "sam_train.cli"])
    arguments = [*argv, f"run_dir={run_dir}"]
    process = context.Process(target=train, args=(arguments, run_dir.with_suffix(".out")))
    process.start()
    return process


def finish(argv: Sequence[str], run_dir: Path) -> None:
    """Runs to the end."""
    process = started(argv, run_dir)
    process.join(DEADLINE_S)
    if process.exitcode != 0:
        raise SystemExit(run_dir.with_suffix(".out").read_text()[-5000:])


def logged_step(run_dir: Path) -> int:
    """The last step in metrics.csv, -1 for none."""
    try:
        last = (run_dir / "metrics.csv").read_text().rstrip("\n").rsplit("\n", 1)[-1]
        return int(float(last.split(",", 1)[0]))
    except (OSError, ValueError):
        return -1


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 for none."""
    path = run_dir / "checkpoints" / "last.ckpt"
    if not path.exists():
        return 0
    return int(torch.load(path, weights_only=True, mmap=True)["global_step"])


def is_saving(run_dir: Path, others: set[Path]) -> bool:
    """Whether a checkpoint is being written just now, beside files that an earlier kill left."""
    return bool(set((run_dir / "checkpoints").glob(".last.ckpt.*")) - others)


def kill_once(argv: Sequence[str], run_dir: Path, moment: random.Random, max_steps: int) -> str:
    """Starts the run, or has it go on, and kills it at a moment that `moment` chooses."""
    start = saved_step(run_dir)
    while_saving = moment.random() < 0.3
    further = moment.randint(1, max_steps)
    pause_s = moment.random() * 0.3
    left = set((run_dir / "checkpoints").glob(".last.ckpt.*"))
    process = started(argv, run_dir)
    deadline = time.monotonic() + DEADLINE_S
    # Rows that a killed run left beyond its checkpoint are dropped once the new one has logged.
    before = (run_dir / "metrics.csv").stat().st_mtime_ns if start else 0
    while process.is_alive() and time.monotonic() < deadline:
        fresh = start == 0 or (run_dir / "metrics.csv").stat().st_mtime_ns != before
        if fresh and logged_step(run_dir) >= start + further:
            break
        if while_saving and is_saving(run_dir, left):
            pause_s = 0
            break
        time.sleep(0.002)
    time.sleep(pause_s)
    if not process.is_alive():
        return "ended before it was killed"
    saving = is_saving(run_dir, left)
    os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    at, saved = logged_step(run_dir), saved_step(run_dir)
    kind = "while saving" if saving else "between checkpoints" if at > saved > 0 else "other"
    return (
        f"went on from step {start:4d}  killed at step {at:4d}  last checkpoint {saved:4d}  {kind}"
    )


def differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Where two nested values differ, clock times aside."""
    if any(time_name in name for time_name in TIMES):
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{name}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{name}: {len(one)} and {len(other)} entries"
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{name}[{index}]")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not torch.equal(one, other):
            yield f"{name}: tensors differ"
    elif one != other and not (one != one and other != other):
        yield f"{name}: {one!r} and {other!r}"


def contents(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves, but for its pictures and its log."""
    found: dict[str, Any] = {
        name: torch.load(run_dir / "checkpoints" / name, weights_only=True)
        for name in ("last.ckpt", "best.ckpt")
    }
    with (run_dir / "metrics.csv").open(newline="") as file:
        found["metrics.csv"] = {row["step"]: row for row in csv.DictReader(file)}
    found["metrics.json"] = json.loads((run_dir / "metrics.json").read_text())
    found["metrics.json"].pop("checkpoint")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=12, help="the furthest a run gets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("argv", nargs="*")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    whole, killed = args.out / "whole", args.out / "killed"
    print("undisturbed ...", flush=True)
    finish(args.argv, whole)
    moment = random.Random(args.seed)
    for number in range(args.kills):
        print(f"{number + 1:3d}", kill_once(args.argv, killed, moment, args.max_steps), flush=True)
    finish(args.argv, killed)
    found = list(differences(contents(whole), contents(killed)))
    print("\n".join(found[:40]) if found else "equal, bit for bit: checkpoints, metrics")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
