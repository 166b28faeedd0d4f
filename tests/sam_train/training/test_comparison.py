"""What a sweep leaves: a table and a plot of its runs, failed ones too."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from sam_train.training.comparison import FAILED, compare, differing, read_runs


def write_run(
    folder: Path, lr: float, scores: dict[str, float] | None, *, failure: str = "", **more: Any
) -> None:
    (folder / ".hydra").mkdir(parents=True)
    settings = {"optim": {"lr": lr, "betas": [0.9, 0.99]}, "run_dir": str(folder), **more}
    (folder / ".hydra/config.yaml").write_text(yaml.safe_dump(settings))
    rows = "step,val/mean_iou@1\n0,0.1\n5,0.3\n"
    (folder / "metrics.csv").write_text(rows)
    if scores is not None:
        (folder / "metrics.json").write_text(json.dumps({"metrics": scores}))
    if failure:
        (folder / FAILED).write_text(failure)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "comparison.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_are_ranked_and_shown_by_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "lr=0.1", 0.1, {"mean_iou@1": 0.4, "steps": 5, "noc@85": 7.0})
    write_run(tmp_path / "lr=0.01", 0.01, {"mean_iou@1": 0.6, "steps": 5, "noc@85": 5.0})

    compare(tmp_path)

    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0] == "| run | optim.lr | mean_iou@1 | steps | state |"
    assert lines[2] == "| lr=0.01 | 0.01 | 0.6 | 5 | finished |"
    assert [row["noc@85"] for row in table(tmp_path)] == ["5.0", "7.0"]
    with Image.open(tmp_path / "comparison.png") as picture:
        assert min(picture.size) > 200


def test_runs_that_failed_or_stopped_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.1, {"mean_iou@1": 0.4})
    write_run(tmp_path / "b", 0.2, None)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / FAILED).write_text("lr is above 0\n")
    (tmp_path / "figures").mkdir()

    compare(tmp_path)

    states = {row["run"]: (row["state"], row["failure"]) for row in table(tmp_path)}
    assert states == {
        "a": ("finished", ""),
        "b": ("unfinished", ""),
        "c": ("failed", "lr is above 0"),
    }
    assert "failed: lr is above 0" in (tmp_path / "comparison.md").read_text()


def test_where_a_run_lives_is_no_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.1, None, seed=1)
    write_run(tmp_path / "b", 0.1, None, seed=2)

    assert differing(list(read_runs(tmp_path))) == ["seed"]
