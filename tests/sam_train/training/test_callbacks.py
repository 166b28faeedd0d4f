"""Whole toy runs: what they leave behind, what stops them, and how they go on."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_train import cli, config
from sam_train.checkpoints.load import load_model
from sam_train.metrics.click_rollout import click_rollout
from sam_train.metrics.clicks import ClickMetrics
from sam_train.training import callbacks
from sam_train.training.interactive import InteractiveTraining

ROOT = Path(__file__).parents[3]
SIX_STEPS = [
    "trainer.max_steps=6",
    "trainer.val_check_interval=4",
    "callbacks.report.num_pictures=1",
]
Run = Callable[..., int]


def rows(run_dir: Path, name: str) -> dict[int, float]:
    """A column of metrics.csv by step."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return {int(r["step"]): float(r[name]) for r in csv.DictReader(file) if r.get(name)}


def result(run_dir: Path) -> dict[str, Any]:
    found = json.loads((run_dir / "metrics.json").read_text())
    assert isinstance(found, dict)
    return found


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of last.ckpt, which must load without running any code."""
    last = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    found = last["state_dict"]
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def finished(toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps, validated at the start, after four and at the end."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert cli.run("train", [*toy, *SIX_STEPS, f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.fixture
def train(toy: list[str], tmp_path: Path) -> Run:
    """`sam-train` at toy sizes in a folder of its own."""
    return lambda *argv: cli.run("train", [*toy, f"run_dir={tmp_path}", *argv])


@pytest.fixture
def signals_restored() -> Iterator[dict[int, Any]]:
    """The handlers there were, put back after the test whatever a run did to them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def signal_at_step(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """Sends this process a signal in the middle of a step; `step` counts from 1."""
    measure = callbacks.GradientNorms.on_before_optimizer_step

    def interrupted(self: Any, trainer: Any, *args: Any) -> None:
        measure(self, trainer, *args)
        if trainer.global_step + 1 == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(callbacks.GradientNorms, "on_before_optimizer_step", interrupted)


def test_a_run_leaves_what_the_interface_names(finished: Path) -> None:
    for name in (".hydra/config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        assert (finished / name).stat().st_size > 0
    for name in ("metrics.csv", "metrics.json", "train.log", "figures/curves.png"):
        assert (finished / name).stat().st_size > 0
    assert len(list(finished.rglob("*.ckpt"))) == 2
    pictures = {path.name for path in (finished / "figures").glob("clicks_*.png")}
    assert pictures == {"clicks_step000004.png", "clicks_step000006.png"}


def test_metrics_json_has_the_form_of_the_interface(finished: Path) -> None:
    found = result(finished)

    metrics = found.pop("metrics")
    assert found == {
        "protocol": "clicks",
        "dataset": "synthetic",
        "num_images": found["num_images"],
        "num_masks": 4,
        "checkpoint": str(finished / "checkpoints/last.ckpt"),
    }
    assert 1 <= found["num_images"] <= 4
    assert {"mean_iou@1", "mean_iou@2", "mean_iou@3", "oracle_mean_iou@1"} <= set(metrics)
    assert {"box_mean_iou", "iou_prediction_mae"} <= set(metrics)
    assert {"train_seconds", "steps", "images_per_second", "masks_per_second"} <= set(metrics)
    scores = r"(mean_iou@[123]|oracle_mean_iou@1|box_mean_iou|iou_prediction_mae)"
    speed = "train_seconds|steps|images_per_second|masks_per_second"
    known = re.compile(rf"(start_)?{scores}(_small|_medium|_large)?|{speed}")
    assert not [name for name in metrics if not known.fullmatch(name)]
    assert all(0 <= value <= 1 for name, value in metrics.items() if "iou" in name)


def test_speed_counts_every_image_once(finished: Path) -> None:
    metrics = result(finished)["metrics"]

    assert metrics["steps"] == 6
    assert metrics["images_per_second"] * metrics["train_seconds"] == pytest.approx(6)
    assert metrics["masks_per_second"] <= 2 * metrics["images_per_second"]


def test_the_start_is_measured_before_the_first_step(finished: Path) -> None:
    metrics = result(finished)["metrics"]
    scores = rows(finished, "val/mean_iou@1")

    assert sorted(scores) == [0, 3, 6], "the start, the step that is the fourth, the end"
    assert metrics["start_mean_iou@1"] == pytest.approx(scores[0])
    assert metrics["mean_iou@1"] == pytest.approx(scores[6])


def test_best_ckpt_loads_and_answers_as_it_did(finished: Path, toy: list[str]) -> None:
    cfg = config.compose("train", [*toy, *SIX_STEPS])
    data = config.instantiate(cfg.data)
    data.setup()
    simulator = config.instantiate(cfg.task.val_prompts)
    model = load_model(finished / "checkpoints/best.ckpt")

    metrics = ClickMetrics(simulator.num_corrections + 1)
    for record in data.val_dataloader():
        metrics.update(click_rollout(model, record, simulator, seed=cfg.seed))

    scores = rows(finished, "val/mean_iou@1")
    best = max(value for step, value in scores.items() if step > 0)
    assert metrics.compute()["mean_iou@1"] == pytest.approx(best, abs=1e-6)
    assert not model.training
    sizes = [(finished / "checkpoints" / f"{n}.ckpt").stat().st_size for n in ("best", "last")]
    assert sizes[0] < 0.5 * sizes[1], "without the optimiser's state"


def test_what_is_logged_belongs_to_the_step_of_its_row(
    finished: Path, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validations = []
    start = InteractiveTraining.on_validation_epoch_start

    def counted(self: InteractiveTraining) -> None:
        validations.append(self.global_step)
        start(self)

    monkeypatch.setattr(InteractiveTraining, "on_validation_epoch_start", counted)
    sparse = ["trainer.max_steps=6", "trainer.log_every_n_steps=2", "trainer.val_check_interval=6"]
    assert train(*sparse) == 0

    assert validations == [0, 6], "the last step's validation is not made twice"
    for name in ("grad_norm/all", "train/loss", "lr", "train/iou_pass1"):
        every, second = rows(finished, name), rows(tmp_path, name)
        assert second == {step: every[step] for step in (1, 3, 5)}, name
    assert sorted(rows(tmp_path, "train/masks_per_second")) == [1, 3, 5]


def test_gradient_norms_are_logged_by_part_and_unclipped(finished: Path) -> None:
    parts = ("image_encoder", "prompt_encoder", "mask_decoder")
    norms = [rows(finished, f"grad_norm/{part}") for part in parts]
    total = rows(finished, "grad_norm/all")

    assert sorted(total) == list(range(6))
    for step, value in total.items():
        assert value == pytest.approx(math.hypot(*(norm[step] for norm in norms)), rel=1e-4)
    assert min(total.values()) > 0.11, "clipping is at 0.1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    finished: Path,
    train: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signals_restored: dict[int, Any],
    number: int,
) -> None:
    with monkeypatch.context() as patched:
        signal_at_step(patched, number, step=3)
        assert train(*SIX_STEPS) == 130
    assert signal.getsignal(number) == signals_restored[number]
    assert not (tmp_path / "metrics.json").exists()
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3

    assert train(*SIX_STEPS) == 0

    assert "Going on from" in capsys.readouterr().out
    there, here = weights(finished), weights(tmp_path)
    assert all(torch.equal(there[name], here[name]) for name in there)
    for name in ("train/loss", "lr", "val/mean_iou@1", "grad_norm/all"):
        # The stop comes before the row of its own step is written.
        expected = {step: value for step, value in rows(finished, name).items() if step != 2}
        assert rows(tmp_path, name) == expected, name
    same = ("steps", "mean_iou@1", "start_mean_iou@1", "box_mean_iou")
    there_metrics, here_metrics = result(finished)["metrics"], result(tmp_path)["metrics"]
    assert {k: here_metrics[k] for k in same} == {k: there_metrics[k] for k in same}
    images = here_metrics["images_per_second"] * here_metrics["train_seconds"]
    assert images == pytest.approx(6)


def test_a_run_stopped_after_its_last_step_still_writes_its_report(
    finished: Path, train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "metrics.json").unlink()

    assert train(*SIX_STEPS) == 0

    assert "Going on from" in capsys.readouterr().out
    there, here = result(finished), result(tmp_path)
    assert here.pop("checkpoint") != there.pop("checkpoint")
    assert here == there
    assert rows(tmp_path, "train/loss") == rows(finished, "train/loss")


@pytest.mark.parametrize("stopped_at", [None, 2, 3, 4])
def test_batches_counted_off_in_epochs_are_those_of_a_run_without_end(
    finished: Path,
    train: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals_restored: dict[int, Any],
    stopped_at: int | None,
) -> None:
    limited = [*SIX_STEPS, "+trainer.limit_train_batches=3"]
    if stopped_at is not None:
        with monkeypatch.context() as patched:
            signal_at_step(patched, signal.SIGINT, step=stopped_at)
            assert train(*limited) == 130

    assert train(*limited) == 0

    there, here = weights(finished), weights(tmp_path)
    assert all(torch.equal(there[name], here[name]) for name in there)
    losses = rows(finished, "train/loss")
    expected = {step: loss for step, loss in losses.items() if step + 1 != stopped_at}
    assert rows(tmp_path, "train/loss") == expected


def test_time_ends_a_run_and_a_resumed_clock_has_run_out(train: Run, tmp_path: Path) -> None:
    budget = ["trainer.max_steps=-1", "trainer.max_time=00:00:00:03"]
    assert train(*budget) == 0

    before, rates = result(tmp_path)["metrics"], rows(tmp_path, "lr")
    assert before["steps"] == len(rates) > 1
    assert rates[max(rates)] < 0.6 * rates[0], "the cosine follows the clock"

    (tmp_path / "metrics.json").unlink()
    assert train(*budget) == 0

    after = result(tmp_path)["metrics"]
    assert rows(tmp_path, "lr") == rates, "no step more"
    assert after["steps"] == before["steps"]
    assert after["mean_iou@1"] == before["mean_iou@1"]


def test_early_stopping_ends_a_run_that_gets_no_better(train: Run, tmp_path: Path) -> None:
    code = train(
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=2",
        "optim.lr=1e-12",
        "trainer.val_check_interval=1",
        "trainer.max_steps=40",
    )

    assert code == 0
    assert result(tmp_path)["metrics"]["steps"] == 3, (
        "one that sets the mark, two that do not beat it"
    )


@pytest.mark.parametrize(
    ("mode", "scores", "kept"),
    [
        ("max", [0.2, 0.1, 0.3, 0.3], [0.2, 0.3]),
        ("min", [0.2, 0.1, 0.3], [0.2, 0.1]),
        ("max", [math.nan, 0.1, math.nan, 0.2], [math.nan, 0.1, 0.2]),
    ],
)
def test_the_best_is_kept(mode: str, scores: list[float], kept: list[float]) -> None:
    class Trainer:
        saved: list[float | None] = []

        def save_checkpoint(self, path: Path, weights_only: bool) -> None:
            self.saved.append(best.best)

    trainer: Any = Trainer()
    Trainer.saved = []
    best = callbacks.BestCheckpoint(path="best.ckpt", monitor="box_mean_iou", mode=mode)
    for score in scores:
        best.consider(trainer, {"box_mean_iou": score})

    assert trainer.saved == pytest.approx(kept, nan_ok=True)
    resumed = callbacks.BestCheckpoint(path="best.ckpt", monitor="box_mean_iou", mode=mode)
    resumed.load_state_dict(best.state_dict())
    assert resumed.best == pytest.approx(kept[-1])


def test_an_unknown_score_to_monitor_is_named(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("trainer.max_steps=1", "callbacks.best.monitor=mean_iou@20") == 2

    text = capsys.readouterr().err
    assert "callbacks.best.monitor is one of mean_iou@1, " in text
    assert "got mean_iou@20" in text
    assert not (tmp_path / "metrics.csv").exists(), "said before any step is taken"


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own_leaves_a_run_that_goes_on(
    toy: list[str], train: Run, tmp_path: Path
) -> None:
    many = ["trainer.max_steps=100000", "data.num_workers=1"]
    command = [sys.executable, "-m", "sam_train.cli", "train", *toy, f"run_dir={tmp_path}", *many]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / "metrics.csv").exists() and 5 in rows(tmp_path, "train/loss"):
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the reader too
        output, _ = process.communicate(timeout=60)

    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "The same command goes on" in output
    stopped_at = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    losses = rows(tmp_path, "train/loss")
    assert sorted(losses) == list(range(stopped_at - 1))

    more = f"trainer.max_steps={stopped_at + 2}"
    assert train(*many, more, "resume=force") == 0

    resumed = rows(tmp_path, "train/loss")
    assert sorted(resumed) == [*losses, stopped_at, stopped_at + 1]
    assert {step: resumed[step] for step in losses} == losses
    start = rows(tmp_path, "val/mean_iou@1")[0]
    assert result(tmp_path)["metrics"]["start_mean_iou@1"] == pytest.approx(start)


def test_a_checkpoint_of_another_model_cannot_be_forced_on_a_run(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("trainer.max_steps=2") == 0
    capsys.readouterr()

    forced = train(
        "trainer.max_steps=4", "model.mask_decoder.transformer.mlp_dim=32", "resume=force"
    )

    assert forced == 2
    said = capsys.readouterr().err
    assert "last.ckpt does not fit this configuration" in said
    assert "Choose another run_dir=PATH" in said


def test_a_run_may_go_on_with_more_clicks_in_validation(train: Run, tmp_path: Path) -> None:
    assert train("trainer.max_steps=2", "task.val_prompts.num_corrections=0") == 0
    forced = ["trainer.max_steps=3", "task.val_prompts.num_corrections=2", "resume=force"]
    assert train(*forced) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert "mean_iou@3" in metrics


def test_validation_can_be_switched_off(train: Run, tmp_path: Path) -> None:
    assert train("trainer.max_steps=2", "trainer.limit_val_batches=0") == 0

    metrics = result(tmp_path)["metrics"]
    assert metrics["steps"] == 2 and "mean_iou@1" not in metrics
    assert not rows(tmp_path, "train/loss").keys() - {0, 1}
    best = load_model(tmp_path / "checkpoints/best.ckpt").state_dict()
    last = weights(tmp_path)
    assert all(torch.equal(best[name], last[f"model.{name}"]) for name in best)


def test_every_validation_looks_at_as_many_images_as_were_asked_for(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    scores = InteractiveTraining.validation_scores

    def counted(self: InteractiveTraining) -> dict[str, float]:
        found = scores(self)
        counts.append(self.num_val_images)
        return found

    monkeypatch.setattr(InteractiveTraining, "validation_scores", counted)
    settings = ["trainer.max_steps=3", "trainer.val_check_interval=2", "data.max_val_masks=null"]
    assert train(*settings, "trainer.limit_val_batches=2") == 0

    assert counts == [2, 2, 2], "before the first step, in Lightning's loop, after the last"
    assert result(tmp_path)["num_images"] == 2


def test_a_validation_that_was_due_when_the_run_was_stopped_is_caught_up_on(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals_restored: dict[int, Any]
) -> None:
    often = ["trainer.max_steps=4", "trainer.val_check_interval=2"]
    with monkeypatch.context() as patched:
        signal_at_step(patched, signal.SIGINT, step=2)
        assert train(*often) == 130
    assert 1 not in rows(tmp_path, "val/mean_iou@1")

    assert train(*often) == 0

    stopped = rows(tmp_path, "val/mean_iou@1")
    whole = tmp_path / "whole"
    assert train(*often, f"run_dir={whole}") == 0
    assert list(stopped.values()) == list(rows(whole, "val/mean_iou@1").values())


def test_early_stopping_counts_a_validation_that_is_caught_up_on(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals_restored: dict[int, Any]
) -> None:
    no_better = [
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=1",
        "optim.lr=1e-12",
        "trainer.val_check_interval=1",
        "trainer.max_steps=5",
    ]
    with monkeypatch.context() as patched:
        signal_at_step(patched, signal.SIGINT, step=2)
        assert train(*no_better) == 130

    assert train(*no_better) == 0

    assert result(tmp_path)["metrics"]["steps"] == 2, "the first sets the mark, the second ends it"


def test_an_average_of_the_weights_is_what_is_kept_as_best(train: Run, tmp_path: Path) -> None:
    settings = ["callbacks=ema", "trainer.max_steps=3", "trainer.val_check_interval=3"]
    assert train(*settings, "callbacks.best.monitor=iou_prediction_mae", "optim.lr=0.01") == 0

    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    state = next(s for name, s in last["callbacks"].items() if "WeightAverage" in name)
    names = [n for n, _ in load_model(tmp_path / "checkpoints/best.ckpt").named_parameters()]
    best = load_model(tmp_path / "checkpoints/best.ckpt").state_dict()
    assert len(names) == len(state["average"]) and state["num_steps"] == 3
    for name, average in zip(names, state["average"], strict=True):
        assert torch.equal(best[name], average), name
    assert any(not torch.equal(best[n], last["state_dict"][f"model.{n}"]) for n in names)


def test_a_run_that_stopped_early_and_was_killed_before_its_report_does_not_train_on(
    train: Run, tmp_path: Path
) -> None:
    settings = [
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=1",
        "optim.lr=1e-12",
        "trainer.val_check_interval=2",
        "trainer.max_steps=40",
        "callbacks.last.every_n_steps=2",
    ]
    assert train(*settings) == 0
    (tmp_path / "metrics.json").unlink()
    assert train(*settings) == 0
    assert result(tmp_path)["metrics"]["steps"] == 4


def test_after_a_fallback_a_save_that_fails_leaves_a_whole_checkpoint(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["trainer.max_steps=2", "callbacks.last.every_n_steps=1"]
    assert train(*settings) == 0
    last = tmp_path / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    (tmp_path / "metrics.json").unlink()

    def full(*args: Any, **settings: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        assert train(*settings) == 2
    assert "is the disk full" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").glob(".*"))

    assert train(*settings) == 0
    assert result(tmp_path)["metrics"]["steps"] == 2
