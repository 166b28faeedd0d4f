"""Half precision from the command line, and on a GPU: losses, weights, the scaler of gradients, memory."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from sam_train import cli, config
from sam_train.structures import ImageBatch
from sam_train.training.interactive import InteractiveTraining

STEPS = ["trainer.max_steps=3", "trainer.limit_val_batches=0"]
Run = Callable[..., dict[str, list[float]]]


def scaled(scale: float) -> list[str]:
    """float16 with a gradient scaler on the CPU, where `trainer.precision=16-mixed` would take bfloat16."""
    scaler = f"{{_target_: torch.amp.GradScaler, device: cpu, init_scale: {scale}}}"
    precision = (
        "_target_: lightning.pytorch.plugins.MixedPrecision, precision: 16-mixed, device: cpu"
    )
    checkpoints = "{_target_: sam_train.training.saving.VerifiedCheckpointIO}"
    plugins = f"[{checkpoints}, {{{precision}, scaler: {scaler}}}]"
    return ["trainer.precision=null", f"trainer.plugins={plugins}"]


@pytest.fixture
def run(toy: list[str], tmp_path: Path) -> Run:
    """`sam-train` at toy sizes; answers with the columns of its metrics.csv."""

    def train(name: str, *argv: str) -> dict[str, list[float]]:
        folder = tmp_path / name
        assert cli.run("train", [*toy, *STEPS, *argv, f"run_dir={folder}"]) == 0
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("train/loss", "grad_norm/all")
        return {column: [float(row[column]) for row in rows] for column in names}

    return train


@pytest.fixture
def loss_dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The number formats of the losses of all steps that follow."""
    found: list[torch.dtype] = []
    step = InteractiveTraining.training_step

    def noted(self: InteractiveTraining, batch: ImageBatch, batch_idx: int) -> Tensor:
        loss = step(self, batch, batch_idx)
        found.append(loss.dtype)
        return loss

    monkeypatch.setattr(InteractiveTraining, "training_step", noted)
    return found


def last(folder: Path) -> dict[str, Any]:
    """The content of last.ckpt."""
    found = torch.load(folder / "checkpoints/last.ckpt", weights_only=True, map_location="cpu")
    assert isinstance(found, dict)
    return found


def is_single(state: dict[str, Tensor]) -> bool:
    floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
    return all(t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in floats)


@pytest.mark.parametrize("half", [["trainer.precision=bf16-mixed"], scaled(1024.0)])
def test_a_run_in_half_precision_stays_near_the_run_in_single(
    run: Run, tmp_path: Path, loss_dtypes: list[torch.dtype], half: list[str]
) -> None:
    single = run("single")
    mixed = run("half", *half)

    assert loss_dtypes == [torch.float32] * 6
    assert mixed["train/loss"] != single["train/loss"], "the precision was another"
    assert mixed["train/loss"] == pytest.approx(single["train/loss"], rel=0.1)
    assert mixed["grad_norm/all"] == pytest.approx(single["grad_norm/all"], rel=0.5), "unscaled"
    assert is_single(last(tmp_path / "half")["state_dict"])


def test_a_gradient_that_overflows_halves_its_scale_and_moves_no_weight(
    run: Run, toy: list[str], tmp_path: Path
) -> None:
    losses = run("half", *scaled(2.0**100))["train/loss"]

    found = last(tmp_path / "half")
    assert found["MixedPrecision"]["scale"] == 2.0**97
    assert all(map(torch.isfinite, torch.tensor(losses)))
    lightning.seed_everything(0, workers=True, verbose=False)
    begun = config.instantiate(config.compose("train", toy).task).model.state_dict()
    assert all(torch.equal(found["state_dict"][f"model.{name}"], begun[name]) for name in begun)


@pytest.fixture
def cuda() -> str:
    """A CUDA device; tests that need it are skipped, and say so, where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: this test is about one and was not run")
    return "cuda"


@pytest.mark.gpu
def test_float16_on_a_gpu_scales_its_gradients(
    cuda: str, run: Run, tmp_path: Path, loss_dtypes: list[torch.dtype]
) -> None:
    on_gpu = [f"trainer.accelerator={cuda}"]
    single = run("single", *on_gpu)
    mixed = run("half", *on_gpu, "trainer.precision=16-mixed")

    found = last(tmp_path / "half")
    assert found["MixedPrecision"]["scale"] > 1
    assert set(loss_dtypes) == {torch.float32} and is_single(found["state_dict"])
    assert mixed["train/loss"] == pytest.approx(single["train/loss"], rel=0.1)


def gradients_of_a_step(
    training: InteractiveTraining, batch: ImageBatch, device: str
) -> dict[str, Tensor]:
    """Of a step without dropout, on a device."""
    training.to(device).eval()
    training.log = training.log_dict = lambda *args, **kw: None  # type: ignore[method-assign,assignment]
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch._asdict().items()
    }
    training._loss(ImageBatch(**moved)).backward()
    named = training.model.named_parameters()
    return {name: p.grad.cpu() for name, p in named if p.grad is not None}


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_the_step_on_the_cpu(
    cuda: str, make_training: Callable[..., InteractiveTraining], blobs: ImageBatch
) -> None:
    expected = gradients_of_a_step(make_training(), blobs, "cpu")
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = gradients_of_a_step(make_training(), blobs, cuda)

    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-3 * largest, name


@pytest.mark.gpu
def test_the_peak_of_a_gpus_memory_obeys_the_chunk_of_masks(
    cuda: str, make_training: Callable[..., InteractiveTraining], blobs: ImageBatch
) -> None:
    def peak(copies: int, *overrides: str) -> int:
        """Bytes that a step takes over what is there before it."""
        index, order = blobs.image_index.repeat(copies).sort(stable=True)
        batch = blobs._replace(
            masks=blobs.masks.repeat(copies, 1, 1)[order],
            boxes=blobs.boxes.repeat(copies, 1)[order],
            image_index=index,
        )
        training = make_training("prompts.num_corrections=3", *overrides).to(cuda)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients_of_a_step(training, batch, cuda)
        return torch.cuda.max_memory_allocated() - before

    peak(1)  # libraries take memory of their own at their first use
    whole, chunked = peak(32), peak(32, "task.mask_chunk=8")
    assert chunked < whole / 3
    growth = peak(64, "task.mask_chunk=8") - chunked
    assert growth < (peak(64) - whole) / 5, "more masks cost what is asked and answered, no more"
