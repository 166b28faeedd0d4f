"""Pictures of a run: its curves, and what the model answers click by click."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sam_train.metrics.click_rollout import trace_clicks
from sam_train.ops import drawing
from sam_train.ops.boxes import xywh_to_xyxy
from sam_train.ops.drawing import click_strip, new_figure, save_figure, save_image, tiled
from sam_train.ops.rle import decode
from sam_train.structures import ImageRecord

if TYPE_CHECKING:
    from sam_train.models.box_detector import BoxDetector
    from sam_train.training.interactive import InteractiveTraining

Panels = Sequence[tuple[str, Sequence[str]]]
"""Titles, and the columns of `metrics.csv` below them."""
BOX_PANEL_PX = 480
"""Longer side of an image with boxes."""
SMOOTHED_OVER = 0.02
"""Share of a curve that is averaged around each point; the raw values stay visible behind."""


def draw_curves(path: Path, metrics_csv: Path, panels_of_run: Panels) -> None:
    """Draws what `metrics.csv` holds so far, in the panels of the task."""
    if not metrics_csv.exists():
        return
    with metrics_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, panels = new_figure(1, len(panels_of_run), panel_in=(4.2, 3.2))
    for panel, (title, names) in zip(np.ravel(panels), panels_of_run, strict=True):
        for index, name in enumerate(names):
            points = [(float(r["step"]), float(r[name])) for r in rows if r.get(name)]
            if not points:
                continue
            steps, values = np.array(points).T
            label = name.split("/")[-1]
            if name.startswith("val/"):
                panel.plot(steps, values, marker="o", markersize=3, color=f"C{index}", label=label)
            else:
                panel.plot(steps, values, color=f"C{index}", alpha=0.25, linewidth=0.8)
                panel.plot(steps, _smoothed(values), color=f"C{index}", label=label)
        panel.set_title(title)
        panel.set_xlabel("step")
        if "norm" in title:
            panel.set_yscale("log")
        if panel.lines:
            panel.legend(frameon=False)
    save_figure(path, figure)


def _smoothed(values: np.ndarray) -> np.ndarray:
    # A kernel longer than the curve would make `np.convolve` answer with more points than it has.
    width = min(max(1, round(len(values) * SMOOTHED_OVER)), (len(values) - 1) // 2)
    kernel = np.ones(2 * width + 1)
    weights = np.convolve(np.ones_like(values), kernel, mode="same")
    return np.convolve(values, kernel, mode="same") / weights


def draw_clicks(
    path: Path, training: InteractiveTraining, records: Iterable[ImageRecord], number: int
) -> None:
    """Draws the largest object of each of `number` validation images, click by click."""
    strips = []
    shown = (record for record in records if any(a.area > 0 for a in record.annotations))
    for record in itertools.islice(shown, number):
        largest = max(range(len(record.annotations)), key=lambda i: record.annotations[i].area)
        (steps,) = trace_clicks(training.model, record, [largest], training.val_prompts)
        gt_mask = decode(record.annotations[largest].rle)
        strips.append(click_strip(record.image, gt_mask, steps, caption=record.key))
    if strips:
        save_image(path, tiled(strips, columns=1))


def draw_boxes(
    path: Path,
    detector: BoxDetector,
    records: Iterable[ImageRecord],
    number: int,
    *,
    min_score: float,
) -> None:
    """Draws the objects of `number` images, and beside them the boxes of at least this score."""
    pairs: list[np.ndarray] = []
    for record in itertools.islice(records, number):
        (found,) = detector.detect([record.image], min_score=min_score)
        truth = np.array([own.bbox for own in record.annotations if own.area > 0]).reshape(-1, 4)
        scale = BOX_PANEL_PX / max(record.size)
        shown = drawing.resized(record.image, scale)
        for boxes, what in ((xywh_to_xyxy(truth), "objects"), (found.boxes.cpu().numpy(), "found")):
            panel = drawing.draw_boxes(shown, boxes * scale, line_px=1)
            pairs.append(drawing.captioned(panel, f"{record.key}: {len(boxes)} {what}"))
    if pairs:
        save_image(path, tiled(pairs, columns=2))
