"""Kills an engine at random moments of a whole plan and compares what it leaves with an undisturbed one.

    python tests/data_engine/kill_rounds.py OUT KILLS SEED [short]

Engines are forked off a process that has imported everything, so that the moments lie in the work. Of the
kills every other one leaves a training that is under way alone, as when a terminal is closed. Prints where each
kill met the engine; exits 1 where the two stores (but for times) or any shard differ, or a file is half-written.
`short` is a plan of two steps without a training.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import lightning  # noqa: F401  else each training would import it
import matplotlib.pyplot  # noqa: F401  and each report this
import torch

import sam_train.training.callbacks  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
import toy_engine

from data_engine import cli
from data_engine.engine import Engine
from data_engine.mask_store.store import open_store
from data_engine.retrain import LocalTrainer, trained, wait_until_free
from data_engine.rounds import DONE
from data_engine.shard_writer import finished
from sam_train import cli as sam_train_cli

STEPS = (
    "[{stage: assisted, num_images: 3},{stage: assisted, num_images: 2},{stage: semi_automatic, "
    "num_images: 2},{stage: automatic, retrain: true}]"
)
SHORT_STEPS = "[{stage: assisted, num_images: 2, retrain: false},{stage: automatic, num_images: 3}]"
MOST_S, SHORT_MOST_S = 12.0, 5.0
"""CPU seconds after which a kill comes at the latest: a report alone takes four."""
LARGE = ("models", "held_out", "rounds/*/shards", "rounds/*/checkpoints")
"""Folders in which nothing may be left of what a killed process was writing."""
UNMEASURED = ["measure.clicks=null", "measure.proposals=null"]


class ForkTrainer(LocalTrainer):
    """Trains in a process of its own, without importing anything anew."""

    def run(self, command: Sequence[str], run_dir: Path) -> Path:
        wait_until_free(run_dir)
        child = os.fork()
        if child == 0:
            os._exit(sam_train_cli.run("train", list(command[1:])))
        _, status = os.waitpid(child, 0)
        if status:
            raise ValueError(f"the training ended with status {status}")
        return trained(run_dir)


def run(root: Path, toys: Path, is_short: bool) -> None:
    """Runs an engine to the end of its plan, from wherever it is."""
    if not (root / "engine.yaml").is_file():
        steps = SHORT_STEPS if is_short else STEPS
        settings = toy_engine.toy_settings("kill_rounds.ForkTrainer", steps, max_steps=3)
        settings += UNMEASURED if is_short else []
        places = [f"images={toys / 'scenes.tar'}", f"checkpoint={toys / 'toy.ckpt'}"]
        _call("init", f"root={root}", "held_out=0.2", *places, *settings)
    while not is_over(root):
        _call("round", f"root={root}", *toy_engine.ANNOTATOR)


def _call(*argv: str) -> None:
    if code := cli.main(list(argv)):
        os._exit(code)


def is_over(root: Path) -> bool:
    """Whether the plan has no further step."""
    if not (root / "engine.yaml").is_file():
        return False
    engine = Engine.open(root)
    rounds = engine.store.rounds()
    engine.close()
    return len(rounds) == len(engine.steps) and rounds[-1].state == DONE


def start(root: Path, toys: Path, log: Path, is_short: bool) -> int:
    """The same in a process group of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    run(root, toys, is_short)
    os._exit(0)


def cpu_seconds(group: int) -> float:
    """What the processes of a group have used: moments are told by it, as a busy machine stretches time."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def kill_once(
    root: Path, toys: Path, log: Path, after_s: float, *, whole_group: bool, is_short: bool
) -> str:
    """Starts the engine and kills it after so many CPU seconds; returns where it was."""
    child = start(root, toys, log, is_short)
    while cpu_seconds(child) < after_s:
        time.sleep(0.01)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"the engine failed with status {status}: see {log}")
            return "ended before"
    os.kill(child, signal.SIGKILL) if not whole_group else os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return place(root)


def place(root: Path) -> str:
    """The stage and state that an engine is in."""
    if not (root / "engine.yaml").is_file():
        return "init"
    store = open_store(root / "engine.sqlite")
    rounds = store.rounds()
    store.close()
    return f"{rounds[-1].stage} {rounds[-1].state}" if rounds else "before round 1"


def finish(root: Path, toys: Path, log: Path, is_short: bool) -> None:
    """Runs undisturbed."""
    _, status = os.waitpid(start(root, toys, log, is_short), 0)
    if status:
        raise SystemExit(f"the engine failed with status {status}: see {log}")


def compare(first: Path, second: Path) -> list[str]:
    """What differs between two engines, and what of the second's shards is not whole."""
    stores = [open_store(root / "engine.sqlite") for root in (first, second)]
    one, other = (store.contents() for store in stores)
    faults = [f"table {name}" for name in one if one[name] != other[name]]
    shards = [
        {path.relative_to(root).as_posix(): path for path in root.glob("rounds/*/shards/*.tar")}
        for root in (first, second)
    ]
    if shards[0].keys() != shards[1].keys():
        faults.append(f"shards {sorted(shards[0].keys() ^ shards[1].keys())}")
    for name in shards[0].keys() & shards[1].keys():
        sums = [hashlib.sha256(found[name].read_bytes()).hexdigest() for found in shards]
        if sums[0] != sums[1] or finished(shards[1][name], in_full=True) is None:
            faults.append(f"shard {name}")
    # Reports and run folders are written over, not trusted; whatever of them was broken off is seen by its name.
    left = [
        path for folder in LARGE for path in second.glob(f"{folder}/.*") if path.name != ".hydra"
    ]
    faults += [f"left over: {path}" for path in left]
    for store in stores:
        store.close()
    return faults


def main() -> None:
    out, kills, seed = Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3])
    is_short = sys.argv[4:] == ["short"]
    most_s = SHORT_MOST_S if is_short else MOST_S
    out.mkdir(parents=True)
    toy_engine.write_toy_model(out / "toy.ckpt")
    toy_engine.write_scenes(out / "scenes.tar", 12)
    whole, killed = out / "whole", out / "killed"
    began = time.monotonic()
    finish(whole, out, out / "whole.log", is_short)
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    moments, met, faults = random.Random(seed), Counter[str](), list[str]()
    number = 0
    while number < kills:
        where = kill_once(
            killed,
            out,
            out / "killed.log",
            moments.uniform(0, most_s),
            whole_group=number % 2 == 0,
            is_short=is_short,
        )
        if where == "ended before":
            faults += compare(whole, killed)
            shutil.rmtree(killed)  # begin anew
            continue
        number += 1
        met[where] += 1
        print(f"kill {number}: {where}", flush=True)
    finish(killed, out, out / "killed.log", is_short)
    faults += compare(whole, killed)
    print(f"{kills} kills, met at {dict(met)}; differences: {faults or 'none'}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    sys.modules["kill_rounds"] = sys.modules["__main__"]
    main()
