"""Measures a model by simulated clicks and shows where it does well and where not."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sam_train.data.source import DamagedSampleError, Source, readable
from sam_train.metrics.click_rollout import click_rollout, trace_clicks
from sam_train.metrics.clicks import (
    NOC_CAP,
    NOC_IOUS,
    REPORTED_CLICKS,
    ClickCurves,
    ClickMetrics,
    number_of_clicks,
    size_class,
)
from sam_train.models.sam import Sam
from sam_train.ops.drawing import click_strip, new_figure, save_figure, save_image, tiled
from sam_train.ops.files import make_writable_folder, write_atomically
from sam_train.ops.rle import decode
from sam_train.prompts.simulator import PromptSimulator
from sam_train.structures import ImageRecord

log = logging.getLogger(__name__)

SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class ObjectScore:
    """A row of the table: one object and its curve.

    Attributes:
        key: of its image, for people; two shards may hold images of the same key.
        image: number of its image in the order of the source.
        index: of its annotation in the image's record.
        id: of its annotation.
        area: pixels of the original image.
        ious: after each click; NaN once it was finished.
        predicted_iou: the model's own of the first click's mask.
        oracle_iou: of the best candidate of the first click.
        box_iou: for its tight box; NaN if not asked for.
    """

    key: str
    image: int
    index: int
    id: int
    area: int
    ious: tuple[float, ...]
    predicted_iou: float
    oracle_iou: float
    box_iou: float

    @property
    def size(self) -> str:
        return SIZES[int(size_class(torch.tensor(self.area)))]

    def noc(self, target: float) -> int:
        """Clicks until the IoU reaches `target`."""
        return int(number_of_clicks(torch.tensor([self.ious]), target))

    @property
    def mean_iou(self) -> float:
        """Over the reported clicks; what objects are ranked by."""
        return sum(self.ious[:REPORTED_CLICKS]) / len(self.ious[:REPORTED_CLICKS])


@dataclass(frozen=True, kw_only=True)
class ClickBenchmark:
    """The protocol `clicks`: writes `metrics.json`, a table of all objects and pictures.

    Attributes:
        simulator: the annotator, `conf/prompts/clicks.yaml`.
        with_box: also measure a tight box alone, per object.
        max_masks: stop once as many are measured: whole images, in an order that only `source` and
            its seed decide. None measures all.
        chunk_size: objects decoded at a time.
        num_cases: pictures of the worst, the middling and the best objects each.
        seed: of the simulator's draws, if it makes any.
    """

    simulator: PromptSimulator
    with_box: bool = True
    max_masks: int | None = None
    chunk_size: int = 64
    num_cases: int = 4
    seed: int = 0

    def run(
        self, model: Sam, source: Source, output_dir: Path, *, checkpoint: str = ""
    ) -> dict[str, Any]:
        """Measures `model` on all of `source`.

        Args:
            model: put in eval mode.
            source: the images and their masks.
            output_dir: gets `metrics.json`, `objects.csv` and `figures/`.
            checkpoint: where the model came from, for the record.

        Returns:
            What `metrics.json` holds.
        """
        model.eval()
        output_dir = Path(output_dir)
        make_writable_folder(output_dir)
        metrics = ClickMetrics(self.simulator.num_corrections + 1)
        scores: list[ObjectScore] = []
        dataset, num_images = "", 0
        with tqdm(total=self.max_masks, unit=" masks", desc="clicks", dynamic_ncols=True) as bar:
            for image, record in enumerate(self._records(source)):
                try:
                    curves = self._rollout(model, record)
                except DamagedSampleError:  # counted and logged already
                    continue
                metrics.update(curves)
                scores += _scores(image, record, curves)
                dataset, num_images = record.source, num_images + 1
                bar.update(len(curves.areas))
                bar.set_postfix_str(f"{num_images} images, {_running(metrics)}", refresh=False)
                if self.max_masks is not None and metrics.num_masks >= self.max_masks:
                    break
        if not scores:
            raise ValueError(
                "expected images with masks to evaluate on, found none: check the data's path, and "
                "with sam-convert check=PATH its content"
            )
        result = {
            "protocol": "clicks",
            "dataset": dataset,
            "num_images": num_images,
            "num_masks": metrics.num_masks,
            "checkpoint": str(checkpoint),
            "metrics": metrics.compute(),
        }
        write_atomically(output_dir / "objects.csv", objects_table(scores))
        write_atomically(output_dir / "metrics.json", json.dumps(result, indent=2) + "\n")
        plot_curves(output_dir / "figures" / "curves.png", scores)
        self._draw_cases(model, source, output_dir / "figures", scores)
        return result

    def _records(self, source: Source) -> Iterator[ImageRecord]:
        shuffle = self.max_masks is not None
        return readable(source.records(epoch=0, reader=0, num_readers=1, shuffle=shuffle))

    def _rollout(self, model: Sam, record: ImageRecord) -> ClickCurves:
        return click_rollout(
            model,
            record,
            self.simulator,
            with_box=self.with_box,
            chunk_size=self.chunk_size,
            seed=self.seed,
        )

    def _draw_cases(
        self, model: Sam, source: Source, folder: Path, scores: Sequence[ObjectScore]
    ) -> None:
        """Plays the chosen objects again: the first time, nobody knew which they would be."""
        cases = choose_cases(scores, self.num_cases)
        wanted: dict[int, dict[int, ObjectScore]] = defaultdict(dict)
        for score in (score for group in cases.values() for score in group):
            wanted[score.image][score.index] = score
        strips: dict[tuple[int, int], np.ndarray] = {}
        for image, record in enumerate(self._records(source)):
            objects = wanted.pop(image, {})
            if objects:
                strips |= self._strips(model, record, objects)
            if not wanted:
                break
        for name, group in cases.items():
            rows = [strips[score.image, score.index] for score in group]
            if rows:
                save_image(folder / f"{name}.png", tiled(rows, 1))

    def _strips(
        self, model: Sam, record: ImageRecord, objects: dict[int, ObjectScore]
    ) -> dict[tuple[int, int], np.ndarray]:
        traces = trace_clicks(model, record, list(objects), self.simulator, seed=self.seed)
        return {
            (score.image, index): click_strip(
                record.image,
                decode(record.annotations[index].rle),
                steps,
                caption=f"{record.key}, {score.area} px",
            )
            for (index, score), steps in zip(objects.items(), traces, strict=True)
        }


def _scores(image: int, record: ImageRecord, curves: ClickCurves) -> Iterator[ObjectScore]:
    columns = zip(*(part.tolist() for part in curves), strict=True)
    for ious, predicted, oracle, box, area, index in columns:
        id_ = record.annotations[index].id
        yield ObjectScore(
            record.key, image, index, id_, area, tuple(ious), predicted[0], oracle, box
        )


def _running(metrics: ClickMetrics) -> str:
    means = metrics.compute()
    shown = [name for name in ("mean_iou@1", "box_mean_iou") if name in means]
    return ", ".join(f"{name} {means[name]:.3f}" for name in shown)


def choose_cases(scores: Sequence[ObjectScore], number: int) -> dict[str, list[ObjectScore]]:
    """The worst, middling and best objects by mean IoU, from different images as far as there are.

    Returns:
        Lists of at most `number`, under `worst`, `median` and `best`.
    """
    ranked = sorted(scores, key=lambda score: (score.mean_iou, score.image, score.index))
    middle = len(ranked) // 2
    outwards = sorted(range(len(ranked)), key=lambda i: (abs(i - middle), i))
    orders = {"worst": ranked, "median": [ranked[i] for i in outwards], "best": ranked[::-1]}
    return {name: _from_different_images(order, number) for name, order in orders.items()}


def _from_different_images(scores: Sequence[ObjectScore], number: int) -> list[ObjectScore]:
    seen: set[int] = set()
    first_of_image: list[ObjectScore] = []
    others: list[ObjectScore] = []
    for score in scores:
        (others if score.image in seen else first_of_image).append(score)
        seen.add(score.image)
        if len(first_of_image) == number:
            break
    return (first_of_image + others)[:number]


def objects_table(scores: Sequence[ObjectScore]) -> str:
    """All objects as CSV; empty cells where there is no value."""
    num_clicks = len(scores[0].ious)
    has_noc = num_clicks >= NOC_CAP
    header = ["key", "id", "area", "size", "predicted_iou@1", "oracle_iou@1", "box_iou"]
    header += [f"noc@{name}" for name in NOC_IOUS] if has_noc else []
    header += [f"iou@{k + 1}" for k in range(num_clicks)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for score in scores:
        noc = [score.noc(target) for target in NOC_IOUS.values()] if has_noc else []
        ious = (score.predicted_iou, score.oracle_iou, score.box_iou, *score.ious)
        cells = ["" if math.isnan(iou) else f"{iou:.4f}" for iou in ious]
        row = [score.key, score.id, score.area, score.size, *cells[:3], *noc, *cells[3:]]
        writer.writerow(row)
    return text.getvalue()


def plot_curves(path: Path, scores: Sequence[ObjectScore]) -> None:
    """Draws the mean IoU by number of clicks and by size, how the first IoUs spread, and the NoC."""
    ious = np.array([score.ious for score in scores])
    sizes = np.array([score.size for score in scores])
    has_noc = ious.shape[1] >= NOC_CAP
    figure, axes = new_figure(1, 3 if has_noc else 2, panel_in=(4.6, 3.6))
    _plot_means(axes[0, 0], ious[:, :REPORTED_CLICKS], sizes)
    _plot_spread(axes[0, 1], ious[:, 0], np.array([score.box_iou for score in scores]))
    if has_noc:
        _plot_noc(axes[0, 2], scores)
    save_figure(path, figure)


def _plot_means(plot: Any, ious: np.ndarray, sizes: np.ndarray) -> None:
    clicks = np.arange(1, ious.shape[1] + 1)
    plot.plot(clicks, ious.mean(axis=0), "o-", color="#222222", label=f"all ({len(ious)})")
    for size, color in zip(SIZES, ("#ff851b", "#0074d9", "#2ecc40"), strict=True):
        if (sizes == size).any():
            means = ious[sizes == size].mean(axis=0)
            label = f"{size} ({(sizes == size).sum()})"
            plot.plot(clicks, means, "o-", color=color, markersize=4, label=label)
    plot.set(title="Mean IoU by object size", xlabel="clicks", ylim=(0, 1), xticks=clicks)
    plot.legend(loc="lower right", frameon=False)


def _plot_spread(plot: Any, click_ious: np.ndarray, box_ious: np.ndarray) -> None:
    bins = np.linspace(0, 1, 21)
    plot.hist(click_ious, bins, alpha=0.65, color="#0074d9", label="one click")
    if np.isfinite(box_ious).any():
        plot.hist(box_ious, bins, histtype="step", linewidth=2, color="#ff4136", label="a box")
    plot.set(title="IoU after the first prompt", xlabel="IoU", ylabel="objects", xlim=(0, 1))
    plot.yaxis.get_major_locator().set_params(integer=True)
    plot.legend()


def _plot_noc(plot: Any, scores: Sequence[ObjectScore]) -> None:
    counts = [[score.noc(target) for score in scores] for target in NOC_IOUS.values()]
    labels = [
        f"IoU {target:.2f}: mean {np.mean(noc):.2f}"
        for target, noc in zip(NOC_IOUS.values(), counts, strict=True)
    ]
    bins = np.arange(0.5, NOC_CAP + 1)
    plot.hist(counts, bins, color=["#2ecc40", "#0074d9"], label=labels)
    failures = 1 - np.mean([np.nanmax(score.ious) >= NOC_IOUS["90"] for score in scores])
    title = f"Clicks needed ({failures:.0%} never reach 0.90)"
    plot.set(title=title, xlabel=f"clicks ({NOC_CAP} where never reached)", ylabel="objects")
    plot.set_xticks([1, *range(5, NOC_CAP + 1, 5)])
    plot.yaxis.get_major_locator().set_params(integer=True)
    plot.legend(loc="upper center", frameon=False)
