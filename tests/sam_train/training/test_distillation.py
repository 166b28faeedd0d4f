"""A student and its teacher at toy sizes: what is learnt, when, and what stays as it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra.errors import InstantiationException
from torch import Tensor

from sam_train import cli, config
from sam_train.checkpoints.formats import RECORD_KEY, checkpoint_payload
from sam_train.checkpoints.load import load_model
from sam_train.data.embedding_cache import EmbeddingCache, thumbnails
from sam_train.models.fingerprint import embedding_shape, encoder_id
from sam_train.structures import ImageBatch, ImageRecord
from sam_train.training.callbacks import Report, Speed
from sam_train.training.distillation import Distillation, Teacher
from sam_train.training.saving import BestCheckpoint, LastCheckpoint

ROOT = Path(__file__).parents[3]
GUESSED = [
    "++task.first_guess={_target_: sam_train.training.first_guess.GuessTeaching, prompts: ${prompts}}"
]
Make = Callable[..., Distillation]


@pytest.fixture
def make(make_training: Callable[..., Any], toy_teacher: Path) -> Make:
    """Builds the toy distillation, with further overrides."""
    return lambda *more: make_training("task=distill", f"teacher.checkpoint={toy_teacher}", *more)


@dataclass
class Batches:
    """A loader of batches that are there already."""

    batches: Sequence[ImageBatch]

    def __iter__(self) -> Iterator[ImageBatch]:
        return iter(self.batches)


@dataclass
class Watch(lightning.Callback):
    """Keeps what each step logged, and the gradients of the latest."""

    logged: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.model.named_parameters()
        self.gradients = {name: None if p.grad is None else p.grad.clone() for name, p in named}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(training: Distillation, batches: Sequence[ImageBatch]) -> Watch:
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
        limit_val_batches=0,
    )
    trainer.fit(training, Batches(batches), val_dataloaders=Batches([]))
    return watch


def weights(training: Distillation) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}


def test_embeddings_are_learnt_and_the_decoder_stays_the_teachers(
    make: Make, blobs: ImageBatch
) -> None:
    training = make("optim.lr=2e-3", "optim.schedule.final=1.0")

    watch = fit(training, [blobs] * 60)

    errors = [logged["train/embedding_error"] for logged in watch.logged]
    assert errors[-1] < 0.5 * errors[0]
    teacher = training.teacher.model.state_dict()
    for name, tensor in training.model.state_dict().items():
        is_taught = name.startswith("image_encoder.")
        assert is_taught or torch.equal(tensor, teacher[name]), name


def test_answers_are_learnt_with_prompts_in_the_loop(make: Make, blobs: ImageBatch) -> None:
    training = make(
        "optim.lr=2e-3",
        "optim.schedule.final=1.0",
        "task.teaching.embeddings_share=0",
        "task.teaching.embedding_weight=0",
        "task.teaching.gt_weight=0.3",
        "task.teaching.train_decoder=true",
    )

    watch = fit(training, [blobs] * 60)

    losses = [logged["train/loss"] for logged in watch.logged]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_prompts_come_into_the_loop_after_their_share_of_the_run(
    make: Make, blobs: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make("task.teaching.embeddings_share=0.5", "task.teaching.train_decoder=true")
    asked_at: list[int] = []
    answer = training.model.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        asked_at.append(training.global_step)
        return answer(*args, **kwargs)

    monkeypatch.setattr(training.model, "decode", decode)
    before = weights(training)
    fit(training, [blobs] * 2)
    alone = weights(training)

    assert set(asked_at) == {1}
    assert not torch.equal(
        before["mask_decoder.iou_token.weight"], alone["mask_decoder.iou_token.weight"]
    )


def test_before_that_not_even_weight_decay_moves_the_decoder(make: Make, blobs: ImageBatch) -> None:
    training = make("task.teaching.train_decoder=true", "optim.weight_decay=0.5")
    before = weights(training)

    fit(training, [blobs])

    for name, tensor in training.model.state_dict().items():
        is_encoder = name.startswith("image_encoder.")
        assert is_encoder or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("train_decoder", [False, True])
@pytest.mark.parametrize("policy", [[], ["++prompts.mask_prob=1.0"], GUESSED])
def test_what_is_to_learn_has_a_gradient_and_what_is_not_has_none(
    make: Make, blobs: ImageBatch, train_decoder: bool, policy: list[str]
) -> None:
    training = make(
        "task.teaching.embeddings_share=0",
        f"task.teaching.train_decoder={train_decoder}",
        *policy,
    )

    gradients = fit(training, [blobs]).gradients

    for name, gradient in gradients.items():
        is_taught = train_decoder or name.startswith("image_encoder.")
        assert (gradient is not None) == is_taught, name


def test_the_teacher_is_asked_what_the_student_is_asked(
    make: Make, blobs: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make("task.teaching.embeddings_share=0", *GUESSED)
    asked: dict[str, list[Any]] = {"student": [], "teacher": []}
    for who, model in (("student", training.model), ("teacher", training.teacher.model)):
        for method in ("decode", "guess"):
            answer = getattr(model, method)

            def noted(
                features: Any, prompts: Any, *, who: str = who, answer: Any = answer, **how: Any
            ) -> Any:
                asked[who].append((prompts, how))
                return answer(features, prompts, **how)

            monkeypatch.setattr(model, method, noted)

    fit(training, [blobs])

    assert len(asked["student"]) == len(asked["teacher"]) == 3  # a guess and two passes
    for ours, theirs in zip(asked["student"], asked["teacher"], strict=True):
        for a, b in zip(ours[0], theirs[0], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert torch.equal(ours[1].pop("image_index"), theirs[1].pop("image_index"))
        assert ours[1] == theirs[1]
    assert asked["teacher"][-1][0].mask_inputs is not None


@pytest.mark.parametrize("gt_weight", [0.0, 1.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(
    make: Make, blobs: ImageBatch, gt_weight: float
) -> None:
    training = make(
        "task.teaching.embeddings_share=0",
        f"task.teaching.gt_weight={gt_weight}",
        "loss.mask.dice=0",  # the one part that asks to be surer than the teacher
    )
    training.model.load_state_dict(training.teacher.model.state_dict())
    training.teacher.model.train()

    gradients = fit(training, [blobs]).gradients

    norms = [float(g.norm()) for g in gradients.values() if g is not None]
    largest = max(norms)
    assert (largest < 1e-4) == (gt_weight == 0), largest


def test_images_of_half_the_size_are_shown_to_both(
    make: Make, blobs: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make("task.half_size_share=0.5")
    sides: list[int] = []
    encode = training.teacher.model.encode

    def noted(images: Tensor, sizes: Tensor) -> Any:
        sides.append(images.shape[-1])
        return encode(images, sizes)

    monkeypatch.setattr(training.teacher.model, "encode", noted)
    fit(training, [blobs] * 2)

    assert sides == [32, 64]


def test_the_teacher_is_asked_nothing_more_when_the_truths_share_of_the_run_begins(
    make: Make, blobs: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make(
        "task.teaching.embeddings_share=0.25",
        "task.teaching.truth_share=0.5",
        "task.teaching.gt_weight=0",
        "task.teaching.train_decoder=true",
    )
    encoded_at: list[int] = []
    encode = training.teacher.model.encode

    def noted(images: Tensor, sizes: Tensor) -> Any:
        encoded_at.append(training.global_step)
        return encode(images, sizes)

    monkeypatch.setattr(training.teacher.model, "encode", noted)
    before = weights(training)
    fit(training, [blobs] * 4)

    assert encoded_at == [0, 1]
    after = weights(training)
    decoder = "mask_decoder.iou_token.weight"
    assert not torch.equal(before[decoder], after[decoder])


def test_the_truth_alone_is_what_it_is_in_any_training(make: Make, blobs: ImageBatch) -> None:
    losses = []
    for teaching in (
        ["truth_share=1", "gt_weight=0"],
        ["truth_share=0", "gt_weight=1", "embedding_weight=0"],
    ):
        own = [f"task.teaching.{one}" for one in (*teaching, "train_decoder=true")]
        watch = fit(make("task.teaching.embeddings_share=0", *own), [blobs] * 2)
        losses.append([logged["train/loss"] for logged in watch.logged])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2


def test_embeddings_from_a_cache_are_those_that_are_computed(
    toy_teacher: Path, blobs: ImageBatch, tmp_path: Path
) -> None:
    live = Teacher(checkpoint=str(toy_teacher))
    expected = live.encode(blobs).image_embeddings
    fill(tmp_path / "cache", live, blobs, expected)

    cached = Teacher(checkpoint=str(toy_teacher), cache=str(tmp_path / "cache"))

    torch.testing.assert_close(
        cached.encode(blobs).image_embeddings, expected, rtol=1e-3, atol=1e-3
    )


def fill(folder: Path, teacher: Teacher, batch: ImageBatch, embeddings: Tensor) -> None:
    model = teacher.model
    cache = EmbeddingCache(
        folder, encoder=encoder_id(model), shape=embedding_shape(model), dtype="float16"
    )
    with cache.writer() as writer:
        for item in zip(batch.keys, thumbnails(batch.images), embeddings, strict=True):
            writer.add(*item)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.image_encoder.stride=16"], "stride is 8.*set model.image_encoder.stride=8"),
        (["model.image_encoder.out_chans=48"], "set model.image_encoder.out_chans=32"),
        (
            ["model.image_encoder.img_size=128"],
            "set model.image_encoder.img_size=64 or teacher.img_size=128",
        ),
        (["model.image_encoder.high_res_chans=16"], "set model.image_encoder.high_res_chans=32"),
        (["model.mask_decoder.transformer.depth=1"], "mask_decoder.*settings of the teacher's"),
        (["task.teaching.embeddings_share=2"], r"embeddings_share is in \[0, 1\], got 2"),
        (
            ["task.teaching.embeddings_share=0.6", "task.teaching.truth_share=0.5"],
            r"come to 1 at most, got 0\.6 and 0\.5",
        ),
        (["teacher.cache=none"], "no embeddings of this encoder"),
    ],
)
def test_a_student_that_cannot_learn_from_its_teacher_is_told_how_it_could(
    make: Make, overrides: list[str], message: str
) -> None:
    with pytest.raises((ValueError, InstantiationException)) as raised:
        make(*overrides)

    cause = raised.value.__cause__ or raised.value
    assert isinstance(cause, ValueError)
    assert re.search(message, str(cause)), str(cause)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.half_size_share=0.5"], "task.half_size_share=0"),
        (
            [
                "data.train_transform.flips={_target_: sam_train.data.augment.Flips, horizontal: 0.5}"
            ],
            "data.train_transform.flips=null",
        ),
    ],
)
def test_a_cache_is_for_whole_images_as_they_are(
    toy: list[str],
    toy_teacher: Path,
    blobs: ImageBatch,
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    teacher = Teacher(checkpoint=str(toy_teacher))
    fill(tmp_path / "cache", teacher, blobs, teacher.encode(blobs).image_embeddings)
    cached = [f"teacher.checkpoint={toy_teacher}", f"teacher.cache={tmp_path / 'cache'}"]
    cfg = config.compose("train", [*toy, "task=distill", *cached, *overrides])

    with pytest.raises((ValueError, InstantiationException)) as raised:
        training = config.instantiate(cfg.task)
        trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, max_steps=1)
        trainer.fit(training, datamodule=config.instantiate(cfg.data))

    assert message in str(raised.value.__cause__ or raised.value)


def run(
    toy: list[str], teacher: Path, folder: Path, *, resume: Path | None = None, max_steps: int = 4
) -> tuple[Distillation, dict[str, float]]:
    """A whole run with data and callbacks; returns what it trained and its last scores."""
    torch.manual_seed(5)
    overrides = [f"teacher.checkpoint={teacher}", "task.teaching.embeddings_share=0.5", *GUESSED]
    cfg = config.compose("train", [*toy, "task=distill", *overrides, f"run_dir={folder}"])
    training = config.instantiate(cfg.task)
    training.model_config = config.plain(cfg.model, resolve=True)
    report = Report(run_dir=str(folder), num_pictures=0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=[
            Speed(),
            KeepSteps(folder),
            LastCheckpoint(path=str(folder / "last.ckpt"), every_n_steps=1),
            BestCheckpoint(path=str(folder / "best.ckpt"), monitor="embedding_error", mode="min"),
            report,
        ],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        training, datamodule=config.instantiate(cfg.data), ckpt_path=resume, weights_only=True
    )
    return training, report.latest


class KeepSteps(lightning.Callback):
    """Keeps the checkpoint of every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    toy: list[str], toy_teacher: Path, tmp_path: Path, step: int
) -> None:
    undisturbed, scores = run(toy, toy_teacher, tmp_path / "one")

    resumed, resumed_scores = run(
        toy, toy_teacher, tmp_path / "two", resume=tmp_path / "one" / f"step{step}.ckpt"
    )

    for name, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert scores == resumed_scores


def test_the_students_checkpoint_stands_alone_and_its_scores_say_both(
    toy: list[str], toy_teacher: Path, tmp_path: Path, synthetic_scenes: list[ImageRecord]
) -> None:
    training, scores = run(toy, toy_teacher, tmp_path / "run")
    toy_teacher.unlink()

    loaded = load_model(tmp_path / "run" / "last.ckpt")

    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    names = {"mean_iou@1", "teacher_mean_iou@1", "teacher_box_mean_iou", "embedding_error"}
    assert names <= scores.keys() <= written.keys()
    assert (tmp_path / "run" / "best.ckpt").is_file()
    assert set(training.state_dict()) == {f"model.{name}" for name in loaded.state_dict()}


@pytest.mark.parametrize("train_decoder", [False, True])
def test_a_checkpoint_to_start_from_gives_the_encoder_where_the_decoder_stays_the_teachers(
    make: Make, toy: list[str], toy_teacher: Path, tmp_path: Path, train_decoder: bool
) -> None:
    torch.manual_seed(7)
    node = config.compose("train", toy).model
    given = config.instantiate(node)
    path = tmp_path / "given.ckpt"
    state = {f"model.{name}": tensor for name, tensor in given.state_dict().items()}
    record = checkpoint_payload(config.plain(node, resolve=True))
    torch.save({RECORD_KEY: record, "state_dict": state}, path)
    argv = ["task=distill", f"teacher.checkpoint={toy_teacher}", f"checkpoint={path}"]
    still = ["trainer.max_steps=1", "optim.lr=1e-12", "trainer.limit_val_batches=0"]
    folder = tmp_path / "run"
    choice = f"task.teaching.train_decoder={train_decoder}"

    assert cli.run("train", [*toy, *argv, *still, choice, f"run_dir={folder}"]) == 0

    trained, teacher = load_model(folder / "checkpoints/last.ckpt"), load_model(toy_teacher)
    for name, tensor in trained.state_dict().items():
        is_given = train_decoder or name.startswith("image_encoder.")
        torch.testing.assert_close(tensor, (given if is_given else teacher).state_dict()[name])


@pytest.mark.parametrize("part", ["mask_decoder.iou_token.weight", "image_encoder.neck"])
def test_a_run_does_not_go_on_with_another_teacher(
    make: Make, toy: list[str], toy_teacher: Path, tmp_path: Path, part: str
) -> None:
    run(toy, toy_teacher, tmp_path / "one", max_steps=1)
    other = torch.load(toy_teacher, weights_only=True)
    changed = next(name for name in other["state_dict"] if name.startswith(f"model.{part}"))
    other["state_dict"][changed] += 1
    torch.save(other, toy_teacher)

    with pytest.raises(ValueError, match="now holds another model than when this run began"):
        run(toy, toy_teacher, tmp_path / "two", resume=tmp_path / "one/last.ckpt", max_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [[], ["task.teaching.embeddings_share=0", "task.teaching.train_decoder=true", *GUESSED]],
)
def test_two_processes_take_the_step_of_one(
    toy: list[str], toy_teacher: Path, blobs: ImageBatch, tmp_path: Path, policy: list[str]
) -> None:
    torch.save(dict(blobs._asdict()), tmp_path / "batch.pt")
    script = Path(__file__).with_name("steps_of_processes.py")
    overrides = [*toy, "task=distill", f"teacher.checkpoint={toy_teacher}", *policy]

    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), json.dumps(overrides)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"gradients_{n}.pt") for n in (1, 2))
    asked = {name: gradient for name, gradient in one.items() if gradient is not None}
    largest = max(float(gradient.abs().max()) for gradient in asked.values())
    assert one.keys() == two.keys()
    for name, gradient in asked.items():
        assert (gradient - two[name]).abs().max() < 1e-5 * largest, name
