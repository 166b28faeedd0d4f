"""The plots of a round's report, each a file of its own, so that a phone shows it at its full width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from data_engine.agreement import SAME_OBJECT_IOU
from data_engine.audit import IOU_BOUNDS, PAPER_SHARES
from data_engine.records import Model
from data_engine.report_content import Report
from data_engine.report_page import Drawn, Section, titled
from data_engine.round_numbers import RoundNumbers
from sam_train.ops.drawing import new_figure
from sam_train.ops.files import write_atomically

PLOT_IN, DPI = (4.8, 3.3), 130
NUM_BINS = 30
STAGES = {"assisted": "assisted", "semi_automatic": "semi-auto", "automatic": "auto"}
HEADROOM = 1.25
MIN_PLACES, MAX_NAMED = 3, 8
"""Rounds that a plot has room for at least, and whose stages fit below it at most."""
BLUE, GREEN, ORANGE, GREY = "#1f77b4", "#2ca02c", "#e08214", "#9a9a9a"
CLICKS, RECALL = "mean_iou@", "average_recall@"
SHOWN_CLICKS = (1, 3, 5, 9)


class Plot(NamedTuple):
    """A plot to be made.

    Attributes:
        section, name, title, caption: see `Drawn`.
        is_simulated: whether it shows what a simulated annotator did, which it then says.
        draw: draws on an axes of matplotlib.
    """

    section: Section
    name: str
    title: str
    draw: Callable[[Any], None]
    is_simulated: bool = False
    caption: str = ""


def draw(report: Report, folder: Path) -> list[Drawn]:
    """Draws all plots for which there are figures into a folder."""
    drawn = []
    for plot in _plots(report):
        figure, axes = new_figure(1, 1, panel_in=PLOT_IN)
        plot.draw(axes[0, 0])
        title = titled(plot.title, plot.is_simulated)
        axes[0, 0].set_title(title.replace(" (", "\n("), fontsize="medium")
        file = f"{plot.name}.png"
        write_atomically(folder / file, partial(figure.savefig, format="png", dpi=DPI))
        drawn.append(Drawn(plot.section, file, title, plot.caption))
    return drawn


def _plots(report: Report) -> Iterator[Plot]:
    yield from _of_rounds(report)
    yield from _of_work(report)
    yield from _of_masks(report)
    if report.now.rejects:
        yield Plot(
            "rejects",
            "rejects",
            "what became of the candidates",
            partial(_rejects, now=report.now),
        )
    yield from _of_audit(report)
    yield from _of_quality(report)


def _of_rounds(report: Report) -> Iterator[Plot]:
    rounds, simulated = report.rounds, report.is_simulated
    people = [own for own in rounds if own.seconds_per_mask is not None]
    if not any(own.num_masks for own in rounds):
        return
    yield Plot(
        "rounds",
        "masks_per_image",
        "masks per image",
        partial(_masks_per_image, rounds=rounds),
        simulated,
    )
    if people:
        yield Plot(
            "rounds",
            "seconds_per_mask",
            "seconds per mask",
            partial(_seconds, rounds=people),
            simulated,
            "Drawn or corrected: ready-made masks that were passed do not count. All in: everything "
            "between opening an image and handing it in, over all its masks.",
        )
        yield Plot(
            "rounds",
            "clicks_per_mask",
            "clicks per mask drawn or corrected",
            partial(_clicks, rounds=people),
            simulated,
        )
    yield Plot(
        "rounds",
        "share_automatic",
        "share automatic",
        partial(_share_automatic, rounds=rounds),
        simulated,
        "Masks that the model made and nobody changed.",
    )


def _masks_per_image(axes: Any, rounds: Sequence[RoundNumbers]) -> None:
    kinds = {
        "drawn": (BLUE, [own.work.num_drawn if own.work else 0 for own in rounds]),
        "corrected": (ORANGE, [own.work.num_corrected if own.work else 0 for own in rounds]),
        "automatic": (GREEN, [own.num_ready_made for own in rounds]),
    }
    images = np.array([max(own.num_images, 1) for own in rounds])
    bottom = np.zeros(len(rounds))
    for label, (color, counts) in kinds.items():
        if any(counts):
            axes.bar(range(len(rounds)), counts / images, bottom=bottom, color=color, label=label)
            bottom += counts / images
    _name_rounds(axes, rounds)
    axes.set(ylabel="masks per image", ylim=_from_zero(bottom.max()))
    if axes.patches:
        axes.legend(frameon=False, fontsize="small", ncols=3, loc="upper left")


def _seconds(axes: Any, rounds: Sequence[RoundNumbers]) -> None:
    for label, style, values in (
        ("drawn or corrected", "o-", [own.seconds_per_mask for own in rounds]),
        ("all in", "s--", [own.seconds_per_mask_all_in for own in rounds]),
    ):
        axes.plot(range(len(rounds)), _numbers(values), style, label=label)
    _name_rounds(axes, rounds)
    axes.set(ylabel="seconds per mask", ylim=_from_zero(axes.dataLim.ymax))
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")


def _clicks(axes: Any, rounds: Sequence[RoundNumbers]) -> None:
    axes.plot(range(len(rounds)), _numbers([own.clicks_per_mask for own in rounds]), "o-")
    _name_rounds(axes, rounds)
    axes.set(ylabel="clicks per mask", ylim=_from_zero(axes.dataLim.ymax))


def _from_zero(highest: float) -> tuple[float, float]:
    """The limits of an axis with room for a legend."""
    return 0.0, HEADROOM * highest if highest > 0 else 1.0


def _share_automatic(axes: Any, rounds: Sequence[RoundNumbers]) -> None:
    bars = axes.bar(
        range(len(rounds)), _numbers([own.share_automatic for own in rounds]), color=GREEN
    )
    named = ["" if own.share_automatic is None else f"{own.share_automatic:.0%}" for own in rounds]
    axes.bar_label(bars, named, fontsize="small")
    axes.set(ylabel="share of the round's masks", ylim=(0, 1.1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _name_rounds(axes, rounds)


def _name_rounds(axes: Any, rounds: Sequence[RoundNumbers]) -> None:
    names = [str(own.round.number) for own in rounds]
    if len(rounds) <= MAX_NAMED:
        names = [
            f"{name}\n{STAGES.get(own.round.stage, own.round.stage)}"
            for name, own in zip(names, rounds, strict=True)
        ]
    axes.set_xticks(range(len(rounds)), names)
    # A single bar would be as wide as the plot.
    axes.set(xlabel="round", xlim=(-0.6, max(len(rounds), MIN_PLACES) - 0.4))


def _of_work(report: Report) -> Iterator[Plot]:
    now = report.now
    if (work := now.work) is None:
        return
    for name, title, label, values in (
        ("seconds", "seconds on a mask", "seconds", work.mask_seconds),
        ("clicks", "clicks on a mask", "clicks", work.mask_clicks),
    ):
        if len(values):
            yield Plot(
                "work",
                name,
                title,
                partial(_histogram, values=values, label=label, what="masks"),
                now.is_simulated,
            )


def _of_masks(report: Report) -> Iterator[Plot]:
    shapes, simulated = report.shapes, report.now.is_simulated
    columns = (
        ("per_image", "masks on an image", "masks", "images", shapes.masks_per_image, ""),
        (
            "sizes",
            "relative mask size",
            "square root of mask area / image area",
            "masks",
            shapes.relative_sizes,
            "",
        ),
        (
            "concavity",
            "concavity",
            "1 - area / area of the convex hull",
            "masks",
            shapes.concavities,
            "",
        ),
        ("coverage", "coverage", "share of the image in any mask", "images", shapes.coverages, ""),
    )
    for name, title, label, what, values, caption in columns:
        if len(values):
            yield Plot(
                "masks",
                name,
                title,
                partial(_histogram, values=values, label=label, what=what),
                simulated,
                caption,
            )


def _histogram(
    axes: Any,
    values: np.ndarray,
    label: str,
    what: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """With a line at the median; whole numbers get a bar each, where they are few."""
    is_whole = limits is None and bool((values == values.round()).all())
    if limits is not None:
        bins: Any = np.linspace(*limits, NUM_BINS + 1)
    elif is_whole and np.ptp(values) < NUM_BINS:
        bins = np.arange(values.min(), values.max() + 2) - 0.5
    else:
        bins = NUM_BINS
    axes.hist(values, bins=bins, color=BLUE, edgecolor="white", linewidth=0.5)
    median = float(np.median(values))
    axes.axvline(median, color=ORANGE, linewidth=1.5, label=f"median {median:.3g}")
    # Room for the legend above the bars.
    axes.set(xlabel=label, ylabel=what, ylim=_from_zero(axes.dataLim.ymax))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if is_whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Named, as to look for the best place takes long where there are many values.
    axes.legend(frameon=False, fontsize="small", loc="upper right")


def _rejects(axes: Any, now: RoundNumbers) -> None:
    """Candidates alone: what is asked (points) and what is mended is no reject."""
    total = max(now.rejects.get("candidates", 0), 1)
    passed_over = ("points", "candidates")
    shown = {
        name: number
        for name, number in now.rejects.items()
        if name not in passed_over and (number or name == "kept")
    }
    names = list(reversed(shown))
    values = [shown[name] for name in names]
    bars = axes.barh(
        [name.replace("_", " ") for name in names],
        values,
        color=[GREEN if name == "kept" else BLUE for name in names],
    )
    axes.bar_label(
        bars, [f"{value:,} ({value / total:.1%})" for value in values], padding=3, fontsize="small"
    )
    axes.set(xlabel=f"of {total:,} candidates", xlim=(0, 1.45 * max(max(values), 1)))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))  # long numbers want room
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(axis="y", labelsize="small")


def _of_audit(report: Report) -> Iterator[Plot]:
    if (own := report.audit) is not None:
        yield Plot(
            "audit",
            "audit",
            "audit: masks before and after",
            partial(_audit, ious=own.ious),
            report.is_audit_simulated,
            "How many pairs have an IoU greater than the value below.",
        )
    if ious := [own.ious for own in report.agreements if len(own.ious)]:
        yield Plot(
            "audit",
            "agreement",
            "agreement of two annotators",
            partial(
                _histogram,
                values=np.concatenate(ious),
                limits=(SAME_OBJECT_IOU, 1),
                label="IoU of objects that both drew",
                what="objects",
            ),
            report.is_agreement_simulated,
        )


def _audit(axes: Any, ious: np.ndarray) -> None:
    steps = np.linspace(0, 1, 201)
    axes.plot(steps, [(ious > step).mean() for step in steps], color=BLUE, label="this round")
    for bound in IOU_BOUNDS:
        axes.axvline(bound, color=GREY, linewidth=0.8, linestyle=":")
    axes.plot(IOU_BOUNDS, PAPER_SHARES, "D", color=ORANGE, label="SAM, SA-1B")
    axes.set(xlabel="IoU", ylabel="pairs over it", ylim=(0, 1.05), xlim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize="small", loc="lower left")


def _of_quality(report: Report) -> Iterator[Plot]:
    simulated = report.are_models_simulated
    clicks = {
        f"{CLICKS}{number}": f"{number} click{'s' * (number > 1)}" for number in SHOWN_CLICKS
    } | {"box_mean_iou": "box"}
    recalls = {f"{RECALL}{number}": f"{number} masks" for number in (10, 100, 1000)}
    caption = "Hollow: measured, but not promoted."
    for name, title, labels in (
        ("mean_iou", "mean IoU on held-out images", clicks),
        ("average_recall", "average recall on held-out images", recalls),
    ):
        if any(key in own.metrics for own in report.models for key in labels):
            yield Plot(
                "quality",
                name,
                title,
                partial(_quality, models=report.models, labels=labels),
                simulated,
                caption,
            )


def _quality(axes: Any, models: Sequence[Model], labels: dict[str, str]) -> None:
    places = np.arange(len(models))
    for number, (key, label) in enumerate(labels.items()):
        values = np.array(_numbers([own.metrics.get(key) for own in models]))
        if np.isfinite(values).any():
            color = f"C{number}"
            # Through the promoted ones alone: the next round goes on from these.
            kept = np.array([own.promoted for own in models]) & np.isfinite(values)
            axes.plot(places[kept], values[kept], "o-", color=color, label=label)
            axes.plot(places[~kept], values[~kept], "o", color=color, markerfacecolor="white")
    axes.set_xticks(places, ["start" if own.round is None else f"{own.round}" for own in models])
    axes.set(xlabel="trained after round", xlim=(-0.4, len(models) - 0.6))
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _numbers(values: Sequence[Any]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]
