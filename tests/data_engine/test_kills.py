"""Rounds that are killed at random moments end as undisturbed ones do; the script counts and prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_rounds.py")


@pytest.mark.timeout(3600)  # on a busy machine each process waits for its turn
@pytest.mark.parametrize(
    ("kills", "form"), [(3, ["short"]), pytest.param(30, [], marks=pytest.mark.evidence)]
)
def test_kills_change_neither_store_nor_shards(tmp_path: Path, kills: int, form: list[str]) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), str(kills), "5", *form]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, met at" in done.stdout and "differences: none" in done.stdout
