"""One run at a time in a folder, whatever ends the one before."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sam_train import cli
from sam_train.training import run_lock

ROOT = Path(__file__).parents[3]
HOLD = """
import os, sys, time
from pathlib import Path
from sam_train.training import run_lock
with run_lock.held(Path(sys.argv[1])):
    reader = os.fork()  # as a loader forks its readers
    if reader == 0:
        time.sleep(120)
        os._exit(0)
    print(reader, flush=True)
    time.sleep(120)
"""


@contextmanager
def another_run(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the folder, and the reader that it forked."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reader = int(process.stdout.readline())
        try:
            yield process, reader
        finally:
            process.kill()
            os.kill(reader, signal.SIGKILL)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_killed(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*toy, f"run_dir={tmp_path}", "trainer.max_steps=1", "trainer.limit_val_batches=0"]
    with another_run(tmp_path) as (process, reader):
        assert cli.run("train", argv) == 2
        said = capsys.readouterr().err
        who = f"process {process.pid} on {socket.gethostname()}"
        assert re.fullmatch(
            rf"sam-train: \S+ is in use by {re.escape(who)}: .*run_dir=PATH\n", said
        )
        assert [path.name for path in tmp_path.iterdir()] == [".lock"], "nothing is touched"

        process.kill()
        process.wait()
        os.kill(reader, 0)  # lives on, and holds nothing
        assert cli.run("train", argv) == 0

    assert not (tmp_path / ".lock").exists()


def test_a_folder_made_for_nothing_goes_again(tmp_path: Path) -> None:
    for name, is_left in (("empty", False), ("filled", True)):
        with run_lock.held(tmp_path / name):
            assert (tmp_path / name / ".lock").read_text().startswith(f"process {os.getpid()} on ")
            if is_left:
                (tmp_path / name / "train.log").write_text("")
        assert (tmp_path / name).exists() == is_left
        assert not (tmp_path / name / ".lock").exists()


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_the_first_process_holds_the_folder_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with another_run(tmp_path):
        monkeypatch.setenv(variable, "0")
        with pytest.raises(ValueError, match="in use"), run_lock.held(tmp_path):
            pass
        monkeypatch.setenv(variable, "3")
        with run_lock.held(tmp_path):
            pass


def test_where_there_are_no_locks_that_is_only_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unknown)
    with run_lock.held(tmp_path / "run"):
        pass
    assert "file system without locks (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_made_is_left_to_what_writes_there() -> None:
    with run_lock.held(Path("/dev/null/run")), run_lock.held(Path("/proc/no/such/run")):
        pass
