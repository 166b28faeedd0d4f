"""Kills a worker of the automatic stage at random moments: `kill_workers.py IN OUT KILLS SEED`.

One process that imports everything forks a worker for each kill, so that the moments lie in the work and not
in the imports. Prints how many kills met a worker at work.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data_engine.stages.fully_automatic import AutomaticStage
from sam_train import config
from sam_train.checkpoints.load import load_model

SETTINGS = [
    *("images=none", "+stage=automatic", "preset=sam_tiny", "preset.points_per_side=4"),
    *("preset.pred_iou_thresh=0.2", "preset.stability_score_thresh=0.4"),
]


Work = Callable[[], object]


def worker(shards: str, out: Path) -> Work:
    """What makes all that is missing; the model is read here, once."""
    torch.set_num_threads(1)
    node = config.plain(config.compose("segment", SETTINGS).stage, resolve=True)
    stage, model = config.instantiate(node), load_model("sam_tiny")
    assert isinstance(stage, AutomaticStage)
    return lambda: stage.run(model, shards, out, settings=node)


def start(work: Work) -> int:
    """Does the same in a child process; returns its number."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def cpu_seconds(process: int) -> float:
    """What a process has used: moments are told by it, as a busy machine stretches time."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    shards, out, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    work, moments = worker(shards, out), random.Random(seed)
    num_hit = 0
    for _ in range(kills):
        child, after_s = start(work), moments.uniform(0, 1.5)
        is_at_work = True
        while is_at_work and cpu_seconds(child) < after_s:
            time.sleep(0.002)
            is_at_work = os.waitpid(child, os.WNOHANG) == (0, 0)
        if is_at_work:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            num_hit += 1
        if (out / "manifest.json").is_file():  # all is there: begin anew
            for path in out.iterdir():
                path.unlink()
    work()
    print(num_hit)


if __name__ == "__main__":
    main()
