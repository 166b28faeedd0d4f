"""A run that is told to stop before its first step or after its last ends as one that is told during them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sam_train import cli, cli_common
from sam_train.data.datamodule import SamDataModule
from sam_train.training import run_folder
from sam_train.training.interactive import InteractiveTraining

MOMENTS: dict[str, tuple[Any, str]] = {
    "before anything is built": (cli_common, "prepare_host"),
    "while data is looked at": (SamDataModule, "setup"),
    "in the validation before the first step": (InteractiveTraining, "validation_step"),
    "in the report": (run_folder, "finish"),
}
ONE_STEP = ["trainer.max_steps=1", "data.num_workers=1", "data.max_val_masks=1"]


def signalled(monkeypatch: pytest.MonkeyPatch, moment: str, number: int) -> None:
    """Sends this process a signal at a moment of the run, once."""
    owner, name = MOMENTS[moment]
    work = getattr(owner, name)

    def interrupted(*args: Any, **settings: Any) -> Any:
        monkeypatch.setattr(owner, name, work)
        os.kill(os.getpid(), number)
        return work(*args, **settings)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_signal_at_any_moment_ends_in_a_message_and_a_run_that_goes_on(
    toy: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    number: int,
) -> None:
    handler = signal.getsignal(number)
    argv = [*toy, *ONE_STEP, f"run_dir={tmp_path}"]
    signalled(monkeypatch, moment, number)

    assert cli.run("train", argv) == 130

    said = capsys.readouterr().err
    assert "Traceback" not in said and "The same command goes on" in said
    assert signal.getsignal(number) == handler
    assert not (tmp_path / "metrics.json").exists()

    assert cli.run("train", argv) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["steps"] == 1


def test_a_library_that_answers_the_interrupt_with_an_error_of_its_own_is_no_bug(
    toy: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(told: Callable[[], None]) -> None:
        try:
            told()
        except KeyboardInterrupt:
            raise RuntimeError("a reader has gone") from None

    monkeypatch.setattr(
        cli_common, "prepare_host", lambda **_: work(lambda: os.kill(os.getpid(), signal.SIGTERM))
    )
    assert cli.run("train", [*toy, f"run_dir={tmp_path}"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_signal_that_was_ignored_stays_so(
    toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        argv = [*toy, "estimate=true", "estimate_tflops=1", f"run_dir={tmp_path}"]
        signalled(monkeypatch, "before anything is built", signal.SIGTERM)
        assert cli.run("train", argv) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
