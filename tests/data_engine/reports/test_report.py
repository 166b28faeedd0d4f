"""Reports: Markdown, HTML and JSON of a round, and what they say."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from data_engine.audit import Audit, collect_reviews
from data_engine.mask_store.lineage import take_down
from data_engine.mask_store.store import open_store
from data_engine.records import Model
from data_engine.report import ReportSettings, write_report
from data_engine.report_html import as_html
from data_engine.report_markdown import as_markdown
from data_engine.report_page import Folded, Heading, Page, Table, Text

SMALL = ReportSettings(num_images=2, num_masks=3)
NASTY = "<script>alert('x')</script> | *a* & \"b\""


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def three_rounds(engine: Any) -> Any:
    """A round of each stage, the last of them audited; the annotators are simulated."""
    images = engine.images
    third = max(1, len(images) // 3)
    engine.assisted(1, images[:third], ["simulated-0"])
    engine.semi_automatic(2, images[third : 2 * third], "simulated-1")
    engine.automatic(3, images[2 * third :])
    engine.audit(3, Audit(pair=["simulated-0", "simulated-1"], num_pair_images=1), "simulated-0")
    collect_reviews(engine.store, 3)
    return engine


@pytest.fixture(scope="module")
def reported_once(filled_once: Any) -> Any:
    three_rounds(filled_once)
    for number in (1, 2, 3):
        write_report(filled_once.store, filled_once.root, number, SMALL)
    filled_once.store.close()
    return filled_once


@pytest.fixture
def reported(reported_once: Any, tmp_path: Path) -> Iterator[Any]:
    """An engine with three rounds and their reports."""
    engine = copy.copy(reported_once)
    engine.root = shutil.copytree(reported_once.root, tmp_path / "engine")
    engine.store = open_store(engine.root / "engine.sqlite")
    yield engine
    engine.store.close()


def folder(engine: Any, number: int) -> Path:
    return engine.root / "rounds" / f"{number:03d}"


def content(engine: Any, number: int) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (folder(engine, number) / "report.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def test_the_html_is_one_file_that_loads_and_runs_nothing(reported: Any) -> None:
    for number in (1, 2, 3):
        text = (folder(reported, number) / "report.html").read_text(encoding="utf-8")
        page = Parsed(text)

        tags = {name for name, _ in page.tags}
        assert tags.isdisjoint({"script", "link", "iframe", "a", "object"})
        assert not re.search(r"https?:|url\(|@import", text)
        metas = [attributes for name, attributes in page.tags if name == "meta"]
        assert any(own.get("name") == "viewport" for own in metas)
        images = [attributes for name, attributes in page.tags if name == "img"]
        assert len(images) == len(list((folder(reported, number) / "figures").iterdir()))
        for own in images:
            start, data = str(own["src"]).split(",")
            assert start == "data:image/png;base64"
            PillowImage.open(io.BytesIO(base64.b64decode(data))).verify()
            assert own["alt"]


def test_the_markdown_links_figures_that_are_there(reported: Any) -> None:
    for number in (1, 2, 3):
        text = (folder(reported, number) / "report.md").read_text(encoding="utf-8")

        links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)

        assert len(links) > 6
        for link in links:
            with PillowImage.open(folder(reported, number) / link) as picture:
                assert np.ptp(np.asarray(picture.convert("L"))) > 100, f"{link} is blank"
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert any("masks per image" in row for row in rows)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, "masks_per_image seconds_per_mask clicks_per_mask share_automatic seconds clicks"),
        (2, "masks_per_image seconds_per_mask clicks_per_mask share_automatic seconds clicks"),
        (3, "masks_per_image seconds_per_mask share_automatic rejects audit agreement"),
    ],
)
def test_every_figure_that_a_stage_has_is_drawn(reported: Any, number: int, expected: str) -> None:
    drawn = {path.stem for path in (folder(reported, number) / "figures").iterdir()}

    always = "per_image sizes concavity coverage mean_iou average_recall images random best worst"
    assert set(f"{expected} {always}".split()) <= drawn


def test_the_json_says_what_the_store_has(reported: Any) -> None:
    first, second, third = (content(reported, number) for number in (1, 2, 3))

    assert [own["round"] for own in third["rounds"]] == [1, 2, 3]
    assert third["rounds"][0] == {name: first[name] for name in third["rounds"][0]}
    assert first["masks"] == reported.store.num_masks(round=1)
    assert (
        second["work"]["passed"] + second["work"]["corrected"] + second["work"]["drawn"]
        == (second["masks"])
    )
    assert third["masks"] == sum(own.num_masks for own in reported.store.shards(round=3))
    assert third["rejects"]["kept"] == third["masks"]
    assert third["audit"]["num_masks"] == len(reported.store.reviews(round=3))
    assert third["agreements"][0]["mean_iou"] == pytest.approx(1)
    num_masks = [own["masks"] for own in third["rounds"]]
    ready_made = second["work"]["passed"] + third["masks"]
    assert third["share_automatic_so_far"] == pytest.approx(ready_made / sum(num_masks))
    shapes = third["shapes"]
    assert 0 <= shapes["concavities"]["min"] <= shapes["concavities"]["max"] < 1
    assert 0 < shapes["coverages"]["mean"] <= 1
    assert third["config"]["step"] == {"stage": "automatic"}


def test_models_come_in_the_order_of_their_making_up_to_the_round(reported: Any) -> None:
    detector = Model(id="d", path="d", round=1, config={"kind": "detector"}, metrics={"x": 1.0})
    reported.store.put_model(detector)
    write_report(reported.store, reported.root, 1, SMALL)
    write_report(reported.store, reported.root, 2, SMALL)

    assert [own["id"] for own in content(reported, 1)["models"]] == ["start", "after-1"]
    models = content(reported, 2)["models"]
    assert [(own["id"], own["promoted"]) for own in models] == [
        ("start", True),
        ("after-1", True),
        ("after-2", False),
    ]
    page = Parsed((folder(reported, 2) / "report.html").read_text(encoding="utf-8"))
    assert "round 2, not promoted 0.600" in page.text


@pytest.mark.parametrize(("annotator", "simulated"), [("simulated-0", True), ("anna", False)])
def test_figures_of_a_simulated_annotator_say_so(
    scenes: Any, annotator: str, simulated: bool
) -> None:
    scenes.assisted(1, scenes.images, [annotator])
    write_report(scenes.store, scenes.root, 1, SMALL)

    assert content(scenes, 1)["simulated"] == simulated
    for name in ("report.html", "report.md"):
        text = (folder(scenes, 1) / name).read_text(encoding="utf-8")
        assert ("imulated" in text) == simulated


@pytest.mark.parametrize(("labels", "audits"), [("simulated-0", "anna"), ("anna", "simulated-0")])
def test_what_people_did_beside_simulated_annotators_is_told_apart(
    scenes: Any, labels: str, audits: str
) -> None:
    scenes.assisted(1, scenes.images[:2], [labels])
    scenes.automatic(2, scenes.images[2:])
    scenes.audit(2, Audit(), audits)
    collect_reviews(scenes.store, 2)

    page = Parsed(write_report(scenes.store, scenes.root, 2, SMALL).read_text(encoding="utf-8"))

    found = content(scenes, 2)
    assert found["simulated"]
    assert [own["simulated"] for own in found["rounds"]] == [labels == "simulated-0", False]
    assert found["audit"]["simulated"] == (audits == "simulated-0")
    assert found["models_simulated"] == (labels == "simulated-0")
    assert ("again by simulated annotators" in page.text) == (audits == "simulated-0")
    titles = [str(own["alt"]) for name, own in page.tags if name == "img"]
    simulated = {own.split(" (")[0] for own in titles if own.endswith("(simulated annotator)")}
    assert ("audit: masks before and after" in simulated) == (audits == "simulated-0")
    assert ("random masks" in simulated) == (audits == "simulated-0")
    assert ("mean IoU on held-out images" in simulated) == (labels == "simulated-0")
    assert "random images with all masks" in set(titles)  # the model's, whoever looked at them


def test_a_picture_of_an_older_report_does_not_stay(scenes: Any) -> None:
    scenes.assisted(1, scenes.images, ["anna"])
    write_report(scenes.store, scenes.root, 1, SMALL)
    assert (folder(scenes, 1) / "figures" / "worst.png").is_file()

    for image in scenes.images:
        take_down(scenes.store, image.id, reason="asked", who="a person", now=0.0)
    page = Parsed(write_report(scenes.store, scenes.root, 1, SMALL).read_text(encoding="utf-8"))

    drawn = {path.stem for path in (folder(scenes, 1) / "figures").iterdir()}
    assert drawn == {"mean_iou", "average_recall"}, "and no plot of nothing"
    assert page.text.count("There is nothing to show yet.") == 2


def test_the_same_store_gives_the_same_report(reported: Any) -> None:
    def files() -> dict[str, bytes]:
        paths = (path for path in folder(reported, 3).rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in paths}

    before = files()
    write_report(reported.store, reported.root, 3, SMALL)

    assert files() == before


def test_a_round_under_way_is_reported_as_such(scenes: Any) -> None:
    scenes.assisted(1, [], ["anna"])
    round_ = scenes.store.round(1)
    scenes.store.put_round(replace(round_, state="annotating"))

    page = Parsed(write_report(scenes.store, scenes.root, 1, SMALL).read_text(encoding="utf-8"))

    assert "The round is under way (annotating)" in page.text
    assert content(scenes, 1)["masks_per_image"] is None


def test_a_shard_that_is_gone_is_named_and_the_rest_reported(reported: Any) -> None:
    shard = reported.shards(3)[0]
    shard.unlink()

    page = Parsed(write_report(reported.store, reported.root, 3).read_text(encoding="utf-8"))

    assert "1 automatic shard cannot be read" in page.text
    assert shard.relative_to(reported.root).as_posix() in page.text
    assert "cannot be shown: the image is gone" in page.text


def test_images_that_are_gone_are_said_to_be_so_where_they_would_be_shown(scenes: Any) -> None:
    scenes.assisted(1, scenes.images, ["anna"])
    for path in {own.path for own in scenes.images}:
        Path(path).unlink()

    page = Parsed(write_report(scenes.store, scenes.root, 1, SMALL).read_text(encoding="utf-8"))

    assert "2 pictures cannot be shown: the image is gone" in page.text  # whole ones
    assert page.text.count("3 pictures cannot be shown: the image is gone") == 3


def test_a_round_that_is_not_there_is_refused_with_those_that_are(scenes: Any) -> None:
    scenes.assisted(1, scenes.images, ["anna"])

    with pytest.raises(ValueError, match="there is no round 7; rounds so far: 1"):
        write_report(scenes.store, scenes.root, 7)


def test_text_is_shown_and_never_obeyed() -> None:
    blocks = [
        Heading(NASTY),
        Text(NASTY, warns=True),
        Table((NASTY, "b"), [(NASTY, NASTY)]),
        Folded(NASTY, f"```\n{NASTY}"),
    ]

    html = Parsed(as_html(Page(NASTY, blocks), Path()))
    markdown = as_markdown(Page(NASTY, blocks), "figures")

    assert "script" not in {name for name, _ in html.tags}
    assert html.text.count(NASTY) == 9
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    outside = markdown.replace(f"```\n{NASTY}", "")
    assert not re.search(r"(?<!\\)<", outside)


@pytest.mark.slow
def test_a_report_of_real_nuclei_has_all_its_parts(
    fill: Callable[..., Any], nuclei_shard: Path
) -> None:
    engine = three_rounds(fill(nuclei_shard, "preset.pred_iou_thresh=0.4"))

    write_report(engine.store, engine.root, 3)

    third = content(engine, 3)
    assert third["images"] == 8
    assert third["audit"]["num_images"] > 0
    assert third["shapes"]["concavities"]["median"] < 0.3, "nuclei are nearly convex"
    assert len(list((folder(engine, 3) / "figures").iterdir())) >= 14
