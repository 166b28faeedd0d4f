"""What trainings are given, and how one ends that runs in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data_engine import retrain
from data_engine.engine import Engine
from data_engine.mask_store.store import open_store
from data_engine.plan import Step
from data_engine.records import Model, Shard
from data_engine.retrain import LocalTrainer, judged, wait_until_free
from sam_train import cli_arguments, config
from sam_train.data.mixture import MixtureSource
from sam_train.training import run_lock

sys.path.insert(0, str(Path(__file__).parent))
import toy_engine


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """One of two shards of people and one of the model, and no held-out image."""
    root = tmp_path / "engine"
    settings = {"seed": 0, "images_per_shard": 2, "promote": "better", "promote_by": "mean_iou@1"}
    made = Engine(root, settings, open_store(root / "engine.sqlite", create=True))
    for number, source in ((1, "assisted"), (2, "semi_automatic"), (3, "automatic")):
        path = root / f"rounds/00{number}/shards/{source}-000000.tar"
        toy_engine.write_scenes(path, 10)
        row = Shard(
            path=made.relative(path),
            round=number,
            source=source,  # type: ignore[arg-type]
            num_images=10,
            num_masks=9,
            sha256=str(number),
        )
        made.store.put_shard(row, [])
    return made


def data_of(engine: Engine, shards: Sequence[Shard], step: Step) -> object:
    """The data module that sam-train makes of what it is given."""
    typed = ["experiment=retrain", "checkpoint=x", *retrain._data(engine, shards, step)]
    sizes = ["model.image_encoder.img_size=64", "mask_size=16", "data.num_workers=0"]
    cfg = config.compose("train", [*cli_arguments.parse(typed).overrides, *sizes])
    return config.instantiate(cfg.data)


def test_masks_of_people_are_drawn_ten_times_as_often_as_automatic_ones(engine: Engine) -> None:
    """SAM, appendix A: of 20 and 10 images, 20 x 10 to 10."""
    data = data_of(engine, engine.store.shards(), Step(stage="automatic"))

    source = data.train  # type: ignore[attr-defined]
    assert isinstance(source, MixtureSource)
    assert source.weights == {"human": 200.0, "automatic": 10.0}
    crops = {name: one.crop for name, one in data.train_transform.sources.items()}  # type: ignore[attr-defined]
    assert crops == {"automatic": None}
    assert type(data.train_transform.default.crop).__name__ == "LargeScaleJitter"  # type: ignore[attr-defined]


def test_before_there_are_automatic_masks_all_of_people_are_alike(engine: Engine) -> None:
    shards = [one for one in engine.store.shards() if one.source != "automatic"]

    data = data_of(engine, shards, Step(stage="assisted"))

    assert len(data.train.shards()) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rule", "new", "promoted"),
    [
        ("better", 0.6, True),
        ("better", 0.5, True),
        ("better", 0.4, False),
        ("always", 0.4, True),
        ("never", 0.6, False),
        ("better", None, True),
    ],
)
def test_a_worse_model_is_not_promoted_unless_told_so(
    engine: Engine, rule: str, new: float | None, promoted: bool
) -> None:
    engine.settings = {**engine.settings, "promote": rule}
    before = Model(id="a", path="a", metrics={"mean_iou@1": 0.5}, promoted=True)
    metrics = {} if new is None else {"mean_iou@1": new}
    made = replace(before, id="b", metrics=metrics, promoted=False)

    assert judged(engine, made, before).promoted == promoted

    stored = engine.store.model("b")
    assert stored is not None and stored.promoted == promoted


def test_a_metric_that_nobody_measured_promotes_nothing(engine: Engine) -> None:
    engine.settings = {**engine.settings, "promote_by": "mean_iou@7"}
    model = Model(id="b", path="b", metrics={"mean_iou@1": 0.1})

    with pytest.raises(ValueError, match="promote_by=mean_iou@7 was not measured; there is mean_i"):
        judged(engine, model, replace(model, id="a"))


def test_a_training_that_changed_nothing_leaves_the_model_promoted(engine: Engine) -> None:
    engine.settings = {**engine.settings, "promote": "never"}
    model = Model(id="a", path="a", promoted=True)
    engine.store.put_model(model)

    assert judged(engine, replace(model, promoted=False), model).promoted

    stored = engine.store.model("a")
    assert stored is not None and stored.promoted


@pytest.mark.slow
def test_a_training_runs_in_a_process_of_its_own_and_its_failure_is_told(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    training = [*toy_engine.MODEL, *toy_engine.TRAINING, "trainer.max_steps=1"]
    command = ["sam-train", "data.val.num_scenes=2", "data.max_val_masks=2", *training]

    made = LocalTrainer().run([*command, f"run_dir={run_dir}"], run_dir)

    assert made.is_file() and made.is_relative_to(run_dir)
    with pytest.raises(ValueError, match="ended with exit code 2"):
        LocalTrainer().run([*command, "trainer.max_step=1"], tmp_path / "other")


def hold(folder: Path, held: object, seconds: float) -> None:
    with run_lock.held(folder):
        held.set()  # type: ignore[attr-defined]
        time.sleep(seconds)


def test_a_training_that_goes_on_by_itself_is_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", held, 1.5))
    other.start()
    held.wait()
    began = time.monotonic()

    wait_until_free(tmp_path / "run")

    assert time.monotonic() - began > 1.0
    other.join()
