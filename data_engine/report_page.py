"""A report as a page: titles, sentences, tables and figures in order, before it is Markdown or HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from data_engine import agreement, audit
from data_engine.report_content import Report
from data_engine.round_numbers import RoundNumbers, called

FINISHED = ("reporting", "done")
"""States of a round in which all that a report tells is there."""
Section = Literal["rounds", "work", "masks", "rejects", "audit", "quality", "pictures"]
SIMULATED_NOTE = (
    "Simulated: ground truth played the annotator. Its seconds follow from a stated model of time, and "
    "none of these figures says what a person would have done."
)


NOTHING = "There is nothing to show yet."
MAX_NAMES = 8


class Heading(NamedTuple):
    """A section's title."""

    text: str


class Text(NamedTuple):
    """A paragraph; one that warns stands out."""

    text: str
    warns: bool = False


class Table(NamedTuple):
    """A table of texts: its first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Drawn(NamedTuple):
    """A figure's file and what is said of it.

    Attributes:
        section: of the page.
        file: its name in the folder of figures.
        title: what it shows, for whoever cannot see it too.
        caption: how to read it.
        is_wide: a sheet of pictures, not one plot.
    """

    section: Section
    file: str
    title: str
    caption: str = ""
    is_wide: bool = False


class Figures(NamedTuple):
    """Figures side by side, where there is room."""

    figures: Sequence[Drawn]


class Folded(NamedTuple):
    """A long text that is shown when asked for."""

    title: str
    text: str


Block = Heading | Text | Table | Figures | Folded


class Page(NamedTuple):
    """A page.

    Attributes:
        title: its first line.
        blocks: what follows.
    """

    title: str
    blocks: Sequence[Block]


def titled(title: str, is_simulated: bool) -> str:
    """A figure's title, which says whose work it shows."""
    return f"{title} (simulated annotator)" if is_simulated else title


def build_page(report: Report, figures: Sequence[Drawn]) -> Page:
    """Puts a report into words, with its figures where they belong."""
    title = f"Round {report.now.round.number}: {_stage(report.now)}"
    return Page(title, list(_blocks(report, figures)))


def _blocks(report: Report, figures: Sequence[Drawn]) -> Iterator[Block]:
    now = report.now

    def of(section: Section) -> Iterator[Block]:
        if own := [one for one in figures if one.section == section]:
            yield Figures(own)

    yield from _warnings(report)
    yield _summary(report)
    yield Heading("All rounds so far")
    yield _history(report.rounds)
    yield from of("rounds")
    if now.work is not None:
        yield Heading("Work")
        yield from _work(now)
        yield from of("work")
    yield Heading("Masks")
    num = len(report.shapes.coverages)
    yield Text(f"Measured on {counted(num, 'image')}, drawn at random." if num else NOTHING)
    yield from of("masks")
    if now.rejects:
        yield Heading("Rejects per filter")
        yield from of("rejects")
    if now.work is None or report.audit or report.agreements:
        yield Heading("Audit")
        yield from _audit(report)
        yield from of("audit")
    yield Heading("Model quality on the held-out images")
    yield from _models(report)
    yield from of("quality")
    yield Heading("Pictures")
    yield from list(of("pictures")) or [Text(NOTHING)]
    yield Folded("Configuration of the round", json.dumps(dict(now.round.config), indent=1))


def _warnings(report: Report) -> Iterator[Text]:
    now = report.now
    if report.is_simulated:
        more = len(report.annotators) - MAX_NAMES
        names = ", ".join(report.annotators[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
        yield Text(f"{SIMULATED_NOTE} Annotators: {names}.", warns=True)
    if now.round.state not in FINISHED:
        yield Text(
            f"The round is under way ({now.round.state}): these are its figures so far.", warns=True
        )
    if now.missing:
        shown = ", ".join(now.missing[:5]) + (", ..." if len(now.missing) > 5 else "")
        yield Text(
            f"{counted(len(now.missing), 'automatic shard')} cannot be read here with what was rejected "
            f"for it, which is not counted: {shown}",
            warns=True,
        )


def _summary(report: Report) -> Table:
    """The round beside what the paper has for its stage."""
    now, stage = report.now, report.now.round.stage
    paper = {
        "assisted": ("20 to 44", "34 to 14", ""),
        "semi_automatic": ("44 to 72", "34", ""),
        "automatic": ("about 100", "", "99.1%"),
    }.get(stage, ("", "", ""))
    rows = [
        ("images", whole(now.num_images), ""),
        ("masks", whole(now.num_masks), ""),
        ("masks per image", decimal(now.masks_per_image), paper[0]),
    ]
    if now.work is not None:
        rows += [
            ("seconds per mask drawn or corrected", decimal(now.seconds_per_mask), paper[1]),
            ("seconds per mask, all in", decimal(now.seconds_per_mask_all_in), ""),
            ("clicks per mask drawn or corrected", decimal(now.clicks_per_mask), ""),
        ]
    rows += [
        ("masks that nobody drew or changed", percent(now.share_automatic), ""),
        ("the same, all rounds so far", percent(report.share_automatic_so_far), paper[2]),
    ]
    return Table(("", "this round", "SAM, its data engine"), rows)


def _stage(own: RoundNumbers) -> str:
    return own.round.stage.replace("_", "-")


def _history(rounds: Sequence[RoundNumbers]) -> Table:
    head = ("round", "images", "masks", "per image", "s per mask", "clicks", "automatic")
    rows = [
        (
            f"{own.round.number}, {_stage(own)}" + (", simulated" if own.is_simulated else ""),
            whole(own.num_images),
            whole(own.num_masks),
            decimal(own.masks_per_image),
            decimal(own.seconds_per_mask),
            decimal(own.clicks_per_mask),
            percent(own.share_automatic),
        )
        for own in rounds
    ]
    return Table(head, rows)


def _work(now: RoundNumbers) -> Iterator[Block]:
    work = now.work
    assert work is not None
    hours = work.image_seconds.sum() / 3600
    said = called(work.annotators)
    yield Text(
        f"{counted(len(work.annotators), f'{said}annotator')} did {counted(work.num_done, 'image')} in "
        f"{hours:.2f} {said}hours; {whole(work.num_open)} are open. {counted(work.num_drawn, 'mask')} "
        f"were drawn from nothing. Of the ready-made ones, {whole(work.num_passed)} were left as they "
        f"were, {whole(work.num_corrected)} corrected and {whole(work.num_struck_out)} struck out."
    )
    events = ", ".join(f"{whole(number)} {kind}" for kind, number in sorted(work.events.items()))
    yield Text(f"What they did: {events or 'nothing was recorded'}.")


def _audit(report: Report) -> Iterator[Block]:
    if (own := report.audit) is None:
        yield Text("Nobody has looked at these masks again yet: data-engine audit hands them out.")
    else:
        yield Text(
            f"{counted(own.num_masks, 'mask')} on {counted(own.num_images, 'image')}, drawn at random, "
            f"were looked at again by {called(own.annotators)}annotators: {whole(own.num_untouched)} were "
            f"left as they were, {whole(own.num_struck_out)} struck out (an IoU of 0), and {whole(own.num_added)} "
            "added that were missing. In brackets, the 95% interval."
        )
        shares = (own.share_over_90, own.share_over_75)
        intervals = (own.interval_over_90, own.interval_over_75)
        yield Table(
            ("pairs before and after", "this round", "SAM"),
            [
                (
                    f"IoU over {bound:.2f}",
                    f"{percent(share)} ({percent(low)} to {percent(high)})",
                    percent(paper, 0),
                )
                for bound, share, (low, high), paper in zip(
                    audit.IOU_BOUNDS, shares, intervals, audit.PAPER_SHARES, strict=True
                )
            ]
            + [("mean IoU", f"{own.mean_iou:.3f}", "")],
        )
    if report.agreements:
        yield _agreements(report.agreements)


def _agreements(found: Sequence[agreement.Agreement]) -> Table:
    low, high = (percent(share, 0) for share in agreement.PAPER_RANGE)
    return Table(
        ("two annotators, each on their own", "images", "mean IoU", "SAM", "objects both drew"),
        [
            (
                " and ".join(own.annotators),
                whole(own.num_images),
                percent(own.mean_iou if own.num_common else None),
                f"{low} to {high}",
                f"{percent(own.share_common)} of {whole(sum(own.num_masks))} masks",
            )
            for own in found
        ],
    )


def _models(report: Report) -> Iterator[Block]:
    names = list(dict.fromkeys(name for own in report.models for name in own.metrics))
    shown = [name for name in names if name in QUALITY]
    if not shown:
        yield Text("No model was measured on held-out images yet.")
        return
    yield Table(
        ("trained after", *shown, "model"),
        [
            (
                ("the start" if own.round is None else f"round {own.round}")
                + ("" if own.promoted else ", not promoted"),
                *(_metric(own.metrics.get(name)) for name in shown),
                own.id[:12],
            )
            for own in report.models
        ],
    )


QUALITY = (
    *(f"mean_iou@{clicks}" for clicks in (1, 3, 5, 9)),
    "box_mean_iou",
    *(f"average_recall@{proposals}" for proposals in (10, 100, 1000)),
)
"""What is shown of a model's metrics; `report.json` has all."""


def _metric(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float | int) else "–"


def whole(value: float) -> str:
    """A number of things."""
    return f"{value:,.0f}"


def decimal(value: float | None) -> str:
    """A mean."""
    return "–" if value is None else f"{value:.1f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in [0, 1]."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{whole(number)} {noun}{'s' * (number != 1)}"
