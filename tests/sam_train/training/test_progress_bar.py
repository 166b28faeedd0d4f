"""What a user sees while a run goes on: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from sam_train import cli


class Terminal(io.StringIO):
    """Text that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


RUN = ["trainer.max_steps=4", "trainer.val_check_interval=2"]


def test_a_terminal_shows_the_speed_and_the_time_left(
    toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "0")  # a terminal that does not know its width

    code = cli.run(
        "train", [*toy, *RUN, f"run_dir={tmp_path}", "callbacks.progress.refresh_rate=1"]
    )

    assert code == 0
    shown = re.split(r"[\r\n]+", terminal.getvalue())
    bars = [line for line in shown if re.match(r"step \d", line)]
    middle = [line for line in bars if line.startswith("step 2") and "50%" in line]
    assert middle, shown
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", middle[-1]), "spent and left"
    assert "masks/s=" in middle[-1]
    assert "loss=" in middle[-1]
    assert any("validating" in line for line in bars)
    assert re.match(r"step 4.*100%", bars[-1])
    assert "mean_iou@1=" in bars[-1]
    assert re.search(r"step 4[^\n]*100%[^\n]*\n", terminal.getvalue()), "the bar ends its line"


def test_a_log_gets_a_line_now_and_then_and_no_bar(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*toy, *RUN, f"run_dir={tmp_path}"]

    assert cli.run("train", [*argv, "callbacks.progress.seconds_per_line=0"]) == 0

    text = (tmp_path / "train.log").read_text()
    lines = re.findall(r"step (\d+)  (\d+)%  left (\S+)  (.*)", text)
    assert [line[:2] for line in lines] == [("1", "25"), ("2", "50"), ("3", "75"), ("4", "100")]
    assert "masks/s" in lines[1][3]
    assert "loss" in lines[1][3]
    assert "\r" not in capsys.readouterr().out


def test_a_short_run_writes_no_lines_of_progress(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("train", [*toy, *RUN, f"run_dir={tmp_path}"]) == 0

    assert "step 2" not in (tmp_path / "train.log").read_text()
    assert "step 2" not in capsys.readouterr().out
