"""Holds `estimate=true` against real steps: peak memory and time, a process of its own for each set-up.

    OMP_NUM_THREADS=1 python benchmarks/estimate.py [NAME ...]

Memory is the process's peak resident size less what it had before the model was built, with libraries loaded; time is the
process's CPU time, so that neighbours on the machine count for less.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

STEPS, WARM = 5, 2
ONE_PHASE = ["task.half_size_share=0", "task.first_guess.alone_share=0"]
SMALL_BATCH = ["data.batch_size=2", "data.train_transform.max_masks=8"]
VIT_AT_256 = ["model=sam_vit_b", "model.image_encoder.img_size=256", "prompts=few", *SMALL_BATCH]
CASES = {
    "quickstart": ["experiment=quickstart", *ONE_PHASE],
    "tiny, 11 passes": ["data.batch_size=4", "data.train_transform.max_masks=8"],
    "tiny, 32 masks": ["prompts=few", "data.batch_size=8", "data.train_transform.max_masks=4"],
    "mobile_sam, 256 px": ["model=mobile_sam", *VIT_AT_256[1:]],
    "vit_b, 256 px": VIT_AT_256,
    "vit_b, 256 px, checkpointed": [*VIT_AT_256, "model.image_encoder.grad_checkpointing=true"],
    "vit_b, 256 px, decoder": [*VIT_AT_256, "finetune=decoder"],
}
"""Overrides of the train configuration by name."""
GIB = 2**30


def main(names: list[str]) -> None:
    """Prints a row a set-up: measured, estimated, and the one over the other."""
    print(
        f"{'':<30}{'peak GiB':>10}{'estimate':>10}{'ratio':>8}{'step s':>10}{'estimate':>10}{'ratio':>8}"
    )
    for name in names or CASES:
        answer = subprocess.run(
            [sys.executable, __file__, "--case", name],
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            text=True,
        )
        if answer.returncode:
            print(f"{name}: failed\n{answer.stderr}", flush=True)
            continue
        row = json.loads(answer.stdout.splitlines()[-1])
        cells = [row["peak"] / GIB, row["peak_estimate"] / GIB, row["peak"] / row["peak_estimate"]]
        cells += [row["seconds"], row["seconds_estimate"]]
        cells += [row["seconds"] / row["seconds_estimate"]]
        widths = (10, 10, 8, 10, 10, 8)
        text = "".join(f"{c:>{w}.3f}" for c, w in zip(cells, widths, strict=True))
        print(f"{name:<30}{text}", flush=True)


class Repeated:
    """A loader of one batch over and over; Lightning takes a list for several loaders."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * STEPS)


def run_case(overrides: list[str]) -> dict[str, float]:
    """Trains a few real steps, then reckons the same."""
    warnings.filterwarnings("ignore")
    import lightning
    import torch

    from sam_train import allocator, config
    from sam_train.training.finetune import freeze
    from sam_train.training.machine_speed import measure_speed
    from sam_train.training.step_cost import Run, phases, step_cost

    allocator.keep_freed_memory()
    cfg = config.compose("train", ["data.num_workers=0", "trainer.accelerator=cpu", *overrides])
    data: Any = config.instantiate(cfg.data)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    data.train_dataloader = lambda: Repeated(batch)
    # Libraries are loaded and compile their kernels at the first use, whatever the model's size.
    warm = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Flatten())
    warm(torch.rand(1, 3, 32, 32)).square().sum().backward()
    before = _resident_bytes()
    module = config.instantiate(cfg.task)
    freeze(module.model, cfg.finetune)

    class Clock(lightning.Callback):
        times: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.times.append(time.process_time())

    trainer = config.instantiate(
        {**config.plain(cfg.trainer, resolve=True), "max_steps": STEPS, "limit_val_batches": 0}
        | {"max_time": None, "val_check_interval": None, "enable_progress_bar": False},
        logger=False,
        callbacks=[Clock()],
    )
    trainer.fit(module, datamodule=data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    seconds = (Clock.times[-1] - Clock.times[WARM - 1]) / (STEPS - WARM)

    with torch.device("meta"):
        empty = config.instantiate(cfg.task)
    freeze(empty.model, cfg.finetune)
    run = Run(batch_size=len(batch.images), num_masks=len(batch.masks))
    cost = step_cost(empty, run, phases(empty, run)[-1])
    speed = measure_speed("cpu", clock=time.process_time)
    return {
        "peak": peak,
        "peak_estimate": cost.memory.peak,
        "seconds": seconds,
        "seconds_estimate": speed.seconds(cost.operations),
    }


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(run_case(CASES[sys.argv[2]])))
    else:
        main(sys.argv[1:])
