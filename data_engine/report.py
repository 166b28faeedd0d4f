"""A round's report: `report.md`, `report.html` (one file, for any browser), `report.json` and `figures/`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_engine import report_figures, report_pictures
from data_engine.agreement import agreements
from data_engine.audit import audit_result
from data_engine.automatic_shards import automatic_shards, find_images
from data_engine.examples import Examples, choose_examples
from data_engine.mask_sample import SampledImage, measure_shapes, sampled_images
from data_engine.mask_store.store import Store
from data_engine.records import Model, Round
from data_engine.report_content import Report, as_json
from data_engine.report_html import as_html
from data_engine.report_markdown import as_markdown
from data_engine.report_page import build_page
from data_engine.report_pictures import Pixels
from data_engine.round_numbers import round_numbers
from sam_train.ops.files import write_atomically

FIGURES = "figures"


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """How much of a round is looked at.

    Attributes:
        num_measured: images whose masks are measured.
        num_images: shown whole.
        num_masks: shown close up, of random, best and worst ones each.
        seed: of the draws.
    """

    num_measured: int = 2000
    num_images: int = 6
    num_masks: int = 12
    seed: int = 0


def write_report(
    store: Store, root: Path, round_number: int, settings: ReportSettings | None = None
) -> Path:
    """Writes the report of a round, done or under way, to ROOT/rounds/NNN, over an older one.

    Args:
        store: the engine's.
        root: its folder.
        round_number: of the round.
        settings: how much is looked at; None: as `ReportSettings` has it.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: there is no such round.
        OSError: the folder cannot be written.
    """
    settings = settings or ReportSettings()
    rounds = [own for own in store.rounds() if own.number <= round_number]
    if not rounds or rounds[-1].number != round_number:
        known = ", ".join(str(own.number) for own in store.rounds()) or "none yet"
        raise ValueError(f"there is no round {round_number}; rounds so far: {known}")
    images = sampled_images(store, root, rounds[-1], settings.num_measured, seed=settings.seed)
    report = Report(
        rounds=tuple(round_numbers(store, root, own) for own in rounds),
        shapes=measure_shapes(images),
        audit=audit_result(store, round_number),
        agreements=tuple(agreements(store, round_number)),
        models=tuple(_models(store, round_number)),
    )
    shown = choose_examples(
        images, store.reviews(round=round_number), settings.num_masks, seed=settings.seed
    )
    pixels = _pixels(store, root, rounds[-1], images, shown)
    folder = root / "rounds" / f"{round_number:03d}"
    figures = [
        *report_figures.draw(report, folder / FIGURES),
        *report_pictures.draw(
            folder / FIGURES, report, images[: settings.num_images], shown, pixels
        ),
    ]
    for path in {*(folder / FIGURES).glob("*.png")} - {
        folder / FIGURES / own.file for own in figures
    }:
        path.unlink()  # of an older report: it may show an image that was taken down since
    page = build_page(report, figures)
    write_atomically(folder / "report.md", as_markdown(page, FIGURES))
    write_atomically(folder / "report.html", as_html(page, folder / FIGURES))
    text = json.dumps(as_json(report), indent=1, allow_nan=False)
    write_atomically(folder / "report.json", text + "\n")
    return folder / "report.html"


def _models(store: Store, round_number: int) -> Iterator[Model]:
    found = [own for own in store.models() if own.config.get("kind") != "detector"]
    order = sorted(found, key=lambda own: (-1 if own.round is None else own.round, own.created_at))
    return (own for own in order if own.round is None or own.round <= round_number)


def _pixels(
    store: Store, root: Path, round_: Round, images: Sequence[SampledImage], shown: Examples
) -> dict[str, Pixels]:
    """How to get at the images of what is shown: from a shard, an image is as the model saw it."""
    known = {own.image_id: own.pixels for own in images}
    wanted = {own.image_id for own in shown.all()} - known.keys()
    if wanted:
        shards = [own for own in automatic_shards(store, root, round_.number) if own.is_there]
        found = find_images(store, shards, wanted)
        known |= {image_id: own.pixels for image_id, own in found.items()}
    return known
