"""The short form of `benchmarks/submissions.py`: eight at once, resends, late ones, a killed process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "submissions.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def test_of_400_submissions_by_eight_at_once_none_is_lost_or_doubled(
    kind: str, request: pytest.FixtureRequest
) -> None:
    where = kind if kind == "sqlite" else request.getfixturevalue("postgres_url")
    command = [sys.executable, BENCHMARK, "--submissions", "400", "--kills", "4", "--late", "0.02"]

    done = subprocess.run(
        [*command, "--stores", where], capture_output=True, text=True, check=False, timeout=280
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 400 |" in done.stdout
