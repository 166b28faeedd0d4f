"""What a sweep leaves behind: a table and a plot that compare its runs.

comparison.md    the runs, the best first, with the settings in which they differ and their main scores
comparison.csv   the same with all metrics
comparison.png   a score over the steps, and the final score over what was swept
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sam_train.ops.files import write_atomically
from sam_train.training import run_folder
from sam_train.training.run_folder import METRICS

log = logging.getLogger(__name__)

FAILED = "failed.txt"
"""Holds what ended a run of a sweep, in that run's folder."""
SHOWN = ("mean_iou@1", "mean_iou@3", "box_mean_iou", "start_mean_iou@1", "steps", "train_seconds")
"""The metrics of the short table; the first is what runs are ranked by. Of others, all are shown."""
CURVES = ("val/mean_iou@1", "train/loss", "loss")
"""Columns of metrics.csv; the first that a run has is drawn."""


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        settings: by dotted name, as its configuration holds them.
        metrics: final ones; none of a run that did not finish.
        curve: name and (step, value) points of what is drawn.
        failure: what ended it, or nothing.
    """

    name: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    curve: tuple[str, Sequence[tuple[float, float]]]
    failure: str = ""

    @property
    def state(self) -> str:
        """Finished, failed or unfinished."""
        return "failed" if self.failure else "finished" if self.metrics else "unfinished"


class CompareRuns(Callback):
    """Compares the runs at the end of a sweep."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Writes the comparison in the folder of the sweep."""
        compare(Path(config.hydra.sweep.dir))


def compare(folder: Path) -> None:
    """Writes the table and the plot of the runs below a folder, and says what came out."""
    runs = sorted(read_runs(folder), key=_rank)
    if not runs:
        log.warning("%s holds no run to compare", folder)
        return
    swept = differing(runs)
    shown = [name for name in SHOWN if any(name in run.metrics for run in runs)]
    shown = shown if shown and shown[0] == SHOWN[0] else _all_metrics(runs)
    write_atomically(folder / "comparison.md", _markdown(runs, swept, shown))
    write_atomically(folder / "comparison.csv", _csv(runs, swept, _all_metrics(runs)))
    _draw(folder / "comparison.png", runs, swept, shown)
    for run in runs:
        if run.state != "finished":
            log.warning("%s: %s %s", run.name, run.state, run.failure.partition("\n")[0])
    log.info("%s and comparison.png compare %d runs", folder / "comparison.md", len(runs))


def read_runs(folder: Path) -> Iterator[SweptRun]:
    """The runs of a sweep, those that failed too."""
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        failed = place / FAILED
        state = run_folder.inspect(place)
        if state.config is None and not failed.is_file():
            continue
        result = state.result or {}
        yield SweptRun(
            name=place.name,
            settings=dict(run_folder.leaves(state.config or {})),
            metrics=dict(result.get("metrics", {})),
            curve=_curve(place / METRICS),
            failure=failed.read_text(encoding="utf-8").strip() if failed.is_file() else "",
        )


def differing(runs: Sequence[SweptRun]) -> list[str]:
    """The settings in which runs differ, but for where each lives."""
    known = [run.settings for run in runs if run.settings]
    names = {name: None for settings in known for name in settings}
    return [
        name
        for name in names
        if not run_folder.is_ignored(name)
        and len({repr(settings.get(name)) for settings in known}) > 1
    ]


def _rank(run: SweptRun) -> tuple[bool, float, str]:
    score = run.metrics.get(SHOWN[0])
    if not isinstance(score, float) or math.isnan(score):
        return True, 0.0, run.name
    return False, -score, run.name


def _all_metrics(runs: Sequence[SweptRun]) -> list[str]:
    return list({name: None for run in runs for name in run.metrics})


def _markdown(runs: Sequence[SweptRun], swept: Sequence[str], shown: Sequence[str]) -> str:
    header = ["run", *swept, *shown, "state"]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    for run in runs:
        first_line = run.failure.partition("\n")[0]
        cells = [
            run.name,
            *(_text(run.settings.get(name)) for name in swept),
            *(_text(run.metrics.get(name)) for name in shown),
            f"{run.state}: {first_line}" if first_line else run.state,
        ]
        lines.append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    return "".join(f"| {line} |\n" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _csv(runs: Sequence[SweptRun], swept: Sequence[str], metrics: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *swept, *metrics, "state", "failure"])
    for run in runs:
        settings = [run.settings.get(name, "") for name in swept]
        values = [run.metrics.get(name, "") for name in metrics]
        writer.writerow([run.name, *settings, *values, run.state, run.failure])
    return text.getvalue()


def _curve(path: Path) -> tuple[str, list[tuple[float, float]]]:
    if not path.is_file():
        return "", []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in CURVES:
        if points := [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]:
            return name, points
    return "", []


def _draw(path: Path, runs: Sequence[SweptRun], swept: Sequence[str], shown: Sequence[str]) -> None:
    from sam_train.ops.drawing import new_figure, save_figure

    figure, ((curves, finals),) = new_figure(1, 2, panel_in=(5.5, 3.8))
    for index, run in enumerate(runs):
        name, points = run.curve
        label = run.name if run.state == "finished" else f"{run.name} ({run.state})"
        steps, values = [x for x, _ in points], [y for _, y in points]
        curves.plot(steps, values, marker="o", markersize=3, color=f"C{index}", label=label)
        curves.set_ylabel(name or curves.get_ylabel())
    curves.set_xlabel("step")
    curves.legend(frameon=False, fontsize="small")
    finished = [run for run in runs if run.metrics and shown and shown[0] in run.metrics]
    if finished:
        _draw_finals(finals, finished, swept, shown[0])
    save_figure(path, figure)


def _draw_finals(panel: Any, runs: Sequence[SweptRun], swept: Sequence[str], metric: str) -> None:
    """The final score over the one number that was swept, else a bar a run."""
    points = [
        (float(value), run.metrics[metric])
        for run in runs
        if len(swept) == 1 and isinstance(value := run.settings.get(swept[0]), int | float)
    ]
    panel.set_ylabel(metric)
    if len(points) == len(runs):
        points.sort()
        panel.plot([x for x, _ in points], [y for _, y in points], marker="o")
        panel.set_xlabel(swept[0])
        lowest, highest = points[0][0], points[-1][0]
        if lowest > 0 and highest / lowest >= math.sqrt(10):
            panel.set_xscale("log")
        return
    panel.bar(range(len(runs)), [run.metrics[metric] for run in runs])
    panel.set_xticks(range(len(runs)), [run.name for run in runs], rotation=30, ha="right")
