"""A run that is killed and started again ends bit for bit where an undisturbed one ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SETTINGS = [
    "data.num_workers=2",
    "trainer.accumulate_grad_batches=2",
    "trainer.max_steps=16",
    "trainer.val_check_interval=10",
    "callbacks.last.every_n_steps=5",
]


@pytest.mark.slow
@pytest.mark.parametrize("more", [["callbacks=ema", "callbacks.ema.decay=0.9"], []])
def test_kills_change_nothing(toy: list[str], tmp_path: Path, more: list[str]) -> None:
    script = Path(__file__).with_name("kill_runs.py")
    command = [sys.executable, str(script), "--kills", "3", "--max-steps", "6"]
    found = subprocess.run(
        [*command, "--out", str(tmp_path), "--", *toy, *SETTINGS, *more],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("killed at step") >= 2, found.stdout
