"""Rounds of the plan, one after the other, on scenes with a toy model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data_engine.engine import DETECTOR, Engine
from data_engine.shard_writer import finished
from sam_train.data.sa1b import ShardSource
from sam_train.structures import ImageRecord

sys.path.insert(0, str(Path(__file__).parent))
import toy_engine
from toy_engine import QUIET, call, simulated

ASSISTED = "{stage: assisted, num_images: 3}"
SEMI = "{stage: semi_automatic, num_images: 2}"
AUTOMATIC = "{stage: automatic}"
Begin = Callable[..., Path]


@pytest.fixture
def begin(tmp_path: Path, toys: Path) -> Begin:
    """As everywhere, but that models are measured."""

    def begun(*steps: str, overrides: Sequence[str] = ()) -> Path:
        return toy_engine.begun(tmp_path, toys, *steps, overrides=["held_out=0.2", *overrides])

    return begun


def records(folder: Path) -> list[ImageRecord]:
    source = ShardSource(path=str(folder))
    return list(source.records(epoch=0, reader=0, num_readers=1, shuffle=False))


def test_a_plan_of_all_stages_runs_to_its_end(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    root = begin(ASSISTED, SEMI, AUTOMATIC)

    assert [simulated(root) for _ in range(4)] == [0, 0, 0, 0]

    assert "no further step" in capsys.readouterr().out.splitlines()[-1]
    engine = Engine.open(root)
    assert [one.state for one in engine.store.rounds()] == ["done"] * 3
    first, second, third = engine.models()
    assert (second.parent, third.parent) == (first.id, second.id)
    assert [round_.model_id for round_ in engine.store.rounds()] == [first.id, second.id, third.id]
    assert all("mean_iou@1" in one.metrics for one in (first, second, third))
    assert "average_recall@100" in third.metrics
    (detector,) = engine.models(DETECTOR)
    assert detector.parent == second.id
    assert detector.trained_on == second.trained_on
    assert set(third.trained_on) > set(second.trained_on)
    _check_shards(engine)


def _check_shards(engine: Engine) -> None:
    """Each image is labelled in one round, none that is held out, and each mask says where it is from."""
    seen: set[str] = set()
    held_out = {image.key for image in engine.store.images(held_out=True)}
    for round_ in engine.store.rounds():
        found = records(engine.round_folder(round_.number) / "shards")
        keys = {record.key for record in found}
        assert keys and not keys & (seen | held_out)
        seen |= keys
        for annotation in (one for record in found for one in record.annotations):
            assert annotation.extra["round"] == round_.number
            assert annotation.extra["source"] == round_.stage
            assert ("author" in annotation.extra) == (round_.stage != "automatic")
            assert (annotation.predicted_iou is None) == (round_.stage != "automatic")
    assert seen == {image.key for image in engine.store.images(held_out=False)}


def test_a_round_waits_for_its_annotators_and_then_goes_on(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    root = begin(QUIET)

    assert call("round", f"root={root}") == 0
    assert "waits for 3 tasks" in capsys.readouterr().out
    assert call("status", f"root={root}") == 0
    assert "Waits for annotators: 3 tasks of round 1" in capsys.readouterr().out

    assert simulated(root) == 0
    assert "round 1 assisted: done" in capsys.readouterr().out
    engine = Engine.open(root)
    manifests = [finished(path) for path in (root / "rounds/001/shards").glob("*.tar")]
    assert sum(one.masks for one in manifests if one is not None) == engine.store.num_masks() > 0
    assert (root / "rounds/001/report.html").is_file()


def test_a_model_that_is_worse_is_told_and_not_taken_unless_told_so(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    root = begin(QUIET)
    assert simulated(root) == 0
    engine = Engine.open(root)
    (first,) = engine.models()
    engine.store.put_model(replace(first, metrics={"mean_iou@1": 1.0}))

    assert call("retrain", f"root={root}", "promote=better") == 0

    said = capsys.readouterr().out
    worse = engine.models()[-1]
    assert "is not promoted (mean_iou@1 1.000 before" in said
    assert engine.current_model().id == first.id
    assert call("retrain", f"root={root}", f"promote_model={worse.id[:8]}") == 0
    assert engine.current_model().id == worse.id
