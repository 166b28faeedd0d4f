"""One `metrics.csv` per run: a row a step, columns as they come, whole after a resume."""

from __future__ import annotations

import csv
from pathlib import Path

from sam_train.training.loggers import CSVLogger


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_logged_at_one_step_shares_a_row(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "run" / "metrics.csv")
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.log_metrics({"val/iou": 0.5}, step=0)
    logger.log_metrics({"loss": 0.5}, step=10)
    logger.finalize("success")

    first, second = rows(tmp_path / "run" / "metrics.csv")
    assert (first["step"], first["loss"], first["val/iou"]) == ("0", "1.0", "0.5")
    assert (second["step"], second["loss"], second["val/iou"]) == ("10", "0.5", "")


def test_a_late_metric_adds_a_column_and_keeps_the_rows(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "metrics.csv")
    for step in range(3):
        logger.log_metrics({"loss": float(step)}, step=step)
    logger.log_metrics({"lr": 0.1}, step=3)
    logger.save()

    assert [row["loss"] for row in rows(tmp_path / "metrics.csv")] == ["0.0", "1.0", "2.0", ""]
    assert [row["lr"] for row in rows(tmp_path / "metrics.csv")] == ["", "", "", "0.1"]


def test_saving_twice_does_not_double_a_row(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    logger.log_metrics({"loss": 2.0}, step=0)
    logger.save()
    logger.finalize("success")

    assert [row["loss"] for row in rows(tmp_path / "metrics.csv")] == ["2.0"]


def test_a_resumed_run_drops_the_rows_of_steps_that_it_runs_again(tmp_path: Path) -> None:
    killed = CSVLogger(tmp_path / "metrics.csv")
    for step in (0, 10, 20, 30):
        killed.log_metrics({"loss": float(step)}, step=step)
    killed.save()

    resumed = CSVLogger(tmp_path / "metrics.csv")
    resumed.log_metrics({"loss": -1.0, "lr": 0.1}, step=20)
    resumed.log_metrics({"loss": -2.0}, step=30)
    resumed.finalize("success")

    table = [(row["step"], row["loss"]) for row in rows(tmp_path / "metrics.csv")]
    assert table == [("0", "0.0"), ("10", "10.0"), ("20", "-1.0"), ("30", "-2.0")]


def test_a_half_written_last_line_does_not_stop_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n10")

    logger = CSVLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 0.5}, step=10)
    logger.finalize("success")

    assert [row["loss"] for row in rows(tmp_path / "metrics.csv")] == ["1.0", "0.5"]
