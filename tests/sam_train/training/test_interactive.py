"""One training step, and what many of them do: on a toy model, with a real trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from sam_train.structures import BACKGROUND, BOX_TOP_LEFT, FOREGROUND, ImageBatch, Prompts
from sam_train.training.interactive import InteractiveTraining

ROOT = Path(__file__).parents[3]
MakeTraining = Callable[..., InteractiveTraining]


class Watch(lightning.Callback):
    """Keeps what each step logged, and the gradients of the latest."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.gradients: dict[str, Tensor | None] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.model.named_parameters()
        self.gradients = {
            name: None if p.grad is None else p.grad.clone() for name, p in named if p.requires_grad
        }

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@dataclass
class Batches:
    """A loader of batches that are there already; Lightning would take a list for many loaders."""

    batches: Sequence[ImageBatch]

    def __iter__(self) -> Iterator[ImageBatch]:
        return iter(self.batches)


def fit(training: InteractiveTraining, batches: Sequence[ImageBatch], **settings: Any) -> Watch:
    """Trains on these batches, one a step."""
    watch = Watch()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=len(batches),
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        **settings,
    )
    trainer.fit(training, Batches(batches), val_dataloaders=Batches([]))
    return watch


def prompts_asked(training: InteractiveTraining, monkeypatch: pytest.MonkeyPatch) -> list[Prompts]:
    """A list that fills with what the model is asked."""
    asked: list[Prompts] = []
    answer = training.model.decode

    def decode(features: Any, prompts: Prompts, **kwargs: Any) -> Any:
        asked.append(prompts)
        return answer(features, prompts, **kwargs)

    monkeypatch.setattr(training.model, "decode", decode)
    return asked


def test_a_batch_is_learnt_by_heart(make_training: MakeTraining, blobs: ImageBatch) -> None:
    watch = fit(make_training("optim.lr=2e-3", "optim.schedule.final=1.0"), [blobs] * 120)

    def mean(name: str, steps: slice) -> float:
        values = [logged[name] for logged in watch.logged[steps]]
        return sum(values) / len(values)

    early, late = slice(0, 5), slice(-10, None)
    assert mean("train/loss", late) < 0.4 * mean("train/loss", early)
    for name in ("train/iou_pass0", "train/iou_pass1", "train/iou_point", "train/iou_box"):
        # The first guess at a box begins as an ellipse in it, which is most of a disc already.
        assert mean(name, late) > max(0.9, mean(name, early) + 0.1), name


@pytest.mark.parametrize(
    "policy",
    [
        [],
        ["++prompts.mask_prob=1.0", "prompts.num_corrections=0"],
        ["++prompts.mask_prob=0.5", "prompts.num_corrections=2"],
        ["prompts.box_prob=1.0", "prompts.num_corrections=0"],
        ["prompts.num_corrections=3", "prompts.num_extra_passes=2"],
        ["task=from_scratch", "task.first_guess.alone_share=0"],
        ["task=from_scratch", "task.first_guess.alone_share=0", "++prompts.mask_prob=1.0"],
        ["model.image_encoder.img_size=128"],
    ],
)
def test_no_parameter_is_left_without_a_gradient(
    make_training: MakeTraining, blobs: ImageBatch, policy: list[str]
) -> None:
    if "model.image_encoder.img_size=128" in policy:
        blobs = doubled(blobs)

    gradients = fit(make_training(*policy), [blobs]).gradients

    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, "a distributed run waits for these for ever"


def doubled(batch: ImageBatch) -> ImageBatch:
    """The same batch at twice the size."""
    return batch._replace(
        images=batch.images.repeat_interleave(2, -1).repeat_interleave(2, -2),
        masks=batch.masks.repeat_interleave(2, -1).repeat_interleave(2, -2),
        input_sizes=2 * batch.input_sizes,
        boxes=2 * batch.boxes,
    )


def test_every_part_learns(make_training: MakeTraining, blobs: ImageBatch) -> None:
    gradients = fit(make_training("prompts.num_corrections=2"), [blobs]).gradients

    silent = {
        name for name, gradient in gradients.items() if gradient is None or not gradient.any()
    }
    # What a softmax takes out again, and candidates that are nobody's best.
    excused = ("k_proj.bias", "output_hypernetworks_mlps", "point_embeddings")
    assert not [name for name in silent if not any(part in name for part in excused)]


def test_the_guess_is_taught_beside_the_answers(
    make_training: MakeTraining, blobs: ImageBatch
) -> None:
    def logged(*overrides: str) -> dict[str, float]:
        return fit(make_training(*overrides), [blobs]).logged[0]

    taught = logged("task=from_scratch", "task.first_guess.alone_share=0")
    assert "train/guess_loss" not in logged()
    assert taught["train/guess_loss"] > 0
    assert taught["train/played_loss"] > 0
    assert taught["train/loss"] == pytest.approx(
        taught["train/guess_loss"] + taught["train/played_loss"], rel=1e-5
    )
    alone = logged("task=from_scratch", "task.first_guess.alone_share=1")
    assert alone["train/loss"] == alone["train/guess_loss"]


def test_while_guesses_are_alone_the_rest_stays_as_it_is(
    make_training: MakeTraining, blobs: ImageBatch
) -> None:
    training = make_training("task=from_scratch", "task.first_guess.alone_share=1", "optim=muon")
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    fit(training, [blobs] * 2)

    moved = {
        name for name, p in training.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert any("image_encoder" in name for name in moved)
    assert any("first_guess.filters" in name for name in moved)
    outside = {name for name in moved if not name.startswith("image_encoder")}
    assert all("first_guess" in name for name in outside)
    assert not [name for name in outside if "first_guess.read" in name]


def test_played_passes_leave_the_encoder_to_the_guesses(
    make_training: MakeTraining, blobs: ImageBatch
) -> None:
    def gradients(weight: float) -> dict[str, Tensor | None]:
        settings = ["task.first_guess.alone_share=0", f"task.first_guess.weight={weight}"]
        return fit(make_training("task=from_scratch", *settings), [blobs]).gradients

    unweighted = gradients(0.0)
    silent = [n for n, g in unweighted.items() if n.startswith("image_encoder") and g is not None]
    assert silent
    assert not any(unweighted[name].any() for name in silent)
    assert any(g is not None and g.any() for n, g in unweighted.items() if "transformer" in n)


@pytest.mark.parametrize("box_prob", [0.0, 0.5, 1.0])
def test_prompts_reach_the_model_in_the_input_frame(
    make_training: MakeTraining, blobs: ImageBatch, box_prob: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training(f"prompts.box_prob={box_prob}", "prompts.num_corrections=3")
    asked = prompts_asked(training, monkeypatch)
    fit(training, [blobs])

    assert len(asked) == 4
    first, last = asked[0], asked[-1]
    is_box = first.point_labels[:, 0] == BOX_TOP_LEFT
    moved = (first.point_coords.flatten(1) - blobs.boxes)[is_box]
    assert not is_box.any() or moved.abs().max() < 1.26, "at most 20 px of 1024"
    for gt_mask, coords, labels in zip(blobs.masks, *last[:2], strict=True):
        is_click = (labels == FOREGROUND) | (labels == BACKGROUND)
        assert is_click.sum() >= 3
        cells = (coords[is_click] + 0.5) / 2
        assert (cells % 1 == 0.5).all(), "the middle of a cell of two pixels"
        x, y = cells.long().unbind(1)
        assert torch.equal(gt_mask[y, x], labels[is_click] == FOREGROUND)


def test_what_a_batch_starts_from_is_drawn_anew_each_time_and_the_same_in_every_run(
    make_training: MakeTraining, blobs: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starts_from_masks(seed: int) -> list[bool]:
        training = make_training(
            "++prompts.mask_prob=0.5", "prompts.num_corrections=0", f"seed={seed}"
        )
        asked = prompts_asked(training, monkeypatch)
        fit(training, [blobs] * 12)
        return [prompts.mask_inputs is not None for prompts in asked]

    first = starts_from_masks(seed=0)
    assert set(first) == {True, False}
    assert starts_from_masks(seed=0) == first
    assert starts_from_masks(seed=1) != first


def test_where_no_mask_is_fed_back_its_layers_are_frozen(make_training: MakeTraining) -> None:
    def is_frozen(*policy: str) -> bool:
        layers = make_training(*policy).model.prompt_encoder.mask_downscaling
        (trains,) = {parameter.requires_grad for parameter in layers.parameters()}
        return not trains

    assert is_frozen("prompts.num_corrections=0")
    assert not is_frozen("prompts.num_corrections=1")
    assert not is_frozen("prompts.num_corrections=0", "prompts.num_extra_passes=1")
    assert not is_frozen("prompts.num_corrections=0", "++prompts.mask_prob=0.1")


def test_a_loss_that_is_no_number_names_the_images(
    make_training: MakeTraining, blobs: ImageBatch
) -> None:
    training = make_training()
    with torch.no_grad():
        training.model.mask_decoder.iou_token.weight.fill_(torch.nan)

    with pytest.raises(
        FloatingPointError, match=r"loss is nan .*square, wide, at step 0: .*optim\.lr"
    ):
        fit(training, [blobs])


def test_mixed_precision_keeps_the_loss_in_float32(
    make_training: MakeTraining, blobs: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training()
    kinds: list[tuple[torch.dtype, torch.dtype]] = []
    step, answer = training.training_step, training.model.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        prediction = answer(*args, **kwargs)
        decoded.append(prediction.low_res_masks.dtype)
        return prediction

    def training_step(batch: ImageBatch, batch_idx: int) -> Tensor:
        loss = step(batch, batch_idx)
        kinds.append((decoded[-1], loss.dtype))
        return loss

    decoded: list[torch.dtype] = []
    monkeypatch.setattr(training.model, "decode", decode)
    monkeypatch.setattr(training, "training_step", training_step)
    fit(training, [blobs], precision="bf16-mixed")

    assert kinds == [(torch.bfloat16, torch.float32)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        ["++prompts.mask_prob=0.5"],
        ["task=from_scratch", "task.first_guess.alone_share=0"],
        ["task=from_scratch", "task.first_guess.alone_share=1"],
    ],
)
def test_two_processes_take_the_step_of_one(
    toy: list[str], blobs: ImageBatch, tmp_path: Path, policy: list[str]
) -> None:
    # Three masks on one process, one on the other.
    batch = blobs._replace(
        image_index=torch.tensor([0, 1, 1]),
        masks=blobs.masks[[0, 2, 3]],
        boxes=blobs.boxes[[0, 2, 3]],
    )
    torch.save(dict(batch._asdict()), tmp_path / "batch.pt")
    script = Path(__file__).with_name("steps_of_processes.py")
    overrides = [*toy, "prompts.num_corrections=2", *policy]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), json.dumps(overrides)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    one = torch.load(tmp_path / "gradients_1.pt")
    two = torch.load(tmp_path / "gradients_2.pt")
    largest = max(gradient.abs().max() for gradient in one.values())
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert (gradient - two[name]).abs().max() < 1e-5 * largest, name
    ranks = [torch.load(tmp_path / f"weights_2_{rank}.pt") for rank in range(2)]
    for name, weight in ranks[0].items():
        assert torch.equal(weight, ranks[1][name]), f"{name} drifts apart"


@pytest.mark.parametrize(
    "settings",
    [["task.checkpoint_passes=true"], ["task.mask_chunk=3"], ["task.mask_chunk=1"]],
)
def test_what_saves_memory_changes_no_gradient(
    make_training: MakeTraining, blobs: ImageBatch, settings: list[str]
) -> None:
    def gradients(*overrides: str) -> dict[str, torch.Tensor]:
        training = make_training(*overrides)
        training.log = training.log_dict = lambda *args, **kw: None  # type: ignore[method-assign,assignment]
        training._loss(blobs).backward()
        return {n: p.grad for n, p in training.model.named_parameters() if p.grad is not None}

    plain, saving = gradients(), gradients(*settings)
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_precision_that_rounds_coordinates_is_refused(
    make_training: MakeTraining, blobs: ImageBatch, precision: str
) -> None:
    with pytest.raises(ValueError, match=precision.replace("true", "mixed")):
        fit(make_training(), [blobs], precision=precision)
