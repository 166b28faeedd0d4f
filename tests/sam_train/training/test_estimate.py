"""The cost of a run, told before it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from sam_train import cli, cli_train, config, doctor
from sam_train.training.distillation import Distillation, Teacher
from sam_train.training.estimate import OVERHEAD, can_checkpoint, fitting_batch_size
from sam_train.training.finetune import freeze
from sam_train.training.interactive import InteractiveTraining
from sam_train.training.ledger import Operation
from sam_train.training.machine_speed import Speed, measure_speed
from sam_train.training.step_cost import Phase, Run, StepCost, phases, step_cost

Cost = Callable[..., StepCost]
VIT = [
    "model=sam_vit_b",
    "model.image_encoder.img_size=64",
    "model.image_encoder.embed_dim=32",
    "model.image_encoder.depth=2",
    "model.image_encoder.num_heads=2",
    "model.image_encoder.global_attn_indexes=[1]",
    "model.image_encoder.out_chans=32",
    "model.mask_decoder.transformer.mlp_dim=64",
]


def without_weights(*overrides: str) -> InteractiveTraining:
    with torch.device("meta"):
        module = config.instantiate(config.compose("train", [*VIT, *overrides]).task)
    assert isinstance(module, InteractiveTraining)
    return module


@pytest.fixture
def cost() -> Cost:
    """The cost of a step of a narrow ViT with the given masks and overrides."""

    def measure(num_masks: int = 4, *overrides: str, **options: bool) -> StepCost:
        module = without_weights(*overrides)
        run = Run(batch_size=2, num_masks=num_masks)
        return step_cost(module, run, phases(module, run)[-1], **options)

    return measure


def test_weights_gradients_and_adams_state_are_those_of_the_parameters(cost: Cost) -> None:
    memory = cost(4, "prompts=few").memory
    model = without_weights().model
    num_bytes = 4 * sum(p.numel() for p in model.parameters())

    assert memory.gradients == num_bytes
    assert num_bytes <= memory.weights <= 1.1 * num_bytes  # pixel statistics and position codes too
    assert 2 * num_bytes <= memory.optimiser <= 2.1 * num_bytes
    assert memory.peak > memory.weights + memory.gradients + memory.optimiser


def test_decoder_memory_grows_with_masks_and_passes(cost: Cost) -> None:
    def kept(num_masks: int, corrections: int) -> int:
        overrides = ("prompts=few", f"prompts.num_corrections={corrections}")
        return cost(num_masks, *overrides).memory.kept["decoder passes"]

    one, masks, passes = kept(4, 1), kept(8, 1), kept(4, 3)
    assert 1.7 * one < masks < 2.1 * one
    assert 1.7 * one < passes < 2.2 * one


def test_checkpointing_trades_memory_for_arithmetic(cost: Cost) -> None:
    plain = cost(4, "prompts=few", grad_checkpointing=False)
    less = cost(4, "prompts=few", grad_checkpointing=True)

    assert less.memory.kept["image encoder"] < plain.memory.kept["image encoder"]
    assert sum(op.flops for op in less.operations) > sum(op.flops for op in plain.operations)


def test_a_frozen_encoder_keeps_next_to_nothing() -> None:
    module = without_weights("prompts=few")
    run = Run(batch_size=2, num_masks=4)
    trained = step_cost(module, run, phases(module, run)[-1])
    freeze(module.model, "decoder")
    frozen = step_cost(module, run, phases(module, run)[-1])

    assert not can_checkpoint(module.model)
    kept = [cost.memory.kept.get("image encoder", 0) for cost in (frozen, trained)]
    assert kept[0] < 0.2 * kept[1]
    assert sum(op.flops for op in frozen.operations) < sum(op.flops for op in trained.operations)


def test_a_run_in_phases_is_told_phase_by_phase() -> None:
    with torch.device("meta"):
        cfg = config.compose("train", ["experiment=quickstart"])
        module = config.instantiate(cfg.task)
    found = phases(module, Run(batch_size=8, num_masks=96))

    assert [phase[1:4] for phase in found] == [(128, 0, 384), (128, 8, 384), (256, 8, 384)]
    assert [phase.share for phase in found] == pytest.approx([0.3, 0.5, 0.2])


def test_a_model_with_a_first_guess_is_counted_too() -> None:
    with torch.device("meta"):
        cfg = config.compose("train", ["experiment=quickstart"])
        module = config.instantiate(cfg.task)
    run = Run(batch_size=2, num_masks=4)
    memory = step_cost(module, run, Phase(1.0, 64, 2, 16)).memory

    assert memory.kept["first guess"] > 0
    assert memory.kept["decoder passes"] > 0


def test_an_operation_takes_as_long_as_its_bottleneck() -> None:
    speed = Speed(flops=100.0, moved=10.0, seconds_per_operation=1.0)

    assert speed.seconds([Operation("a", 300, 10), Operation("b", 0, 50)]) == 3 + 1 + 5 + 1


def test_the_machines_speed_is_measured() -> None:
    speed = measure_speed("cpu")

    assert 1e8 < speed.flops < 1e14
    assert 1e7 < speed.moved < 1e13
    assert 0 < speed.seconds_per_operation < 0.1


def test_the_trainers_settings_are_read() -> None:
    trainer = config.plain(config.compose("train", ["experiment=sa1b_vit_h"]).trainer, resolve=True)
    run = Run.of_trainer({**trainer, "max_time": "00:01:00:30"}, batch_size=1, num_masks=64)

    assert (run.processes, run.max_steps, run.seconds) == (256, 90_000, 3630.0)


def test_the_command_tells_the_cost_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*VIT, "prompts=few", "data.train_transform.max_masks=2", "data.batch_size=2"]
    told = ["estimate=true", "estimate_tflops=100", f"run_dir={tmp_path / 'run'}"]

    assert cli.run("train", [*small, *told]) == 0

    text = capsys.readouterr().out
    for line in (
        "optimiser state",
        "image encoder, kept for backward",
        "peak of a step",
        "the run",
    ):
        assert line in text
    assert "grad_checkpointing=true" in text
    assert not (tmp_path / "run").exists()


def test_recomputed_passes_and_chunks_are_counted(cost: Cost) -> None:
    def kept(*overrides: str) -> int:
        return cost(8, "prompts=sam", *overrides).memory.kept.get("decoder passes", 0)

    assert kept("task.checkpoint_passes=true") < kept() / 4
    assert kept("task.mask_chunk=2") <= kept("task.checkpoint_passes=true") * 1.1


def test_the_largest_batch_that_fits_is_found() -> None:
    module = without_weights("prompts=few")
    run = Run(batch_size=1, num_masks=4)

    def peak(batch_size: int) -> float:
        larger = Run(batch_size=batch_size, num_masks=4 * batch_size)
        return OVERHEAD * step_cost(module, larger, phases(module, larger)[-1]).memory.peak

    assert fitting_batch_size(module, run, None, 1.01 * peak(5)) == 5
    assert fitting_batch_size(module, run, 4, 1.01 * peak(5)) > 5, "masks are bounded"
    with pytest.raises(ValueError, match=r"(?s)a single image takes .* task.mask_chunk"):
        fitting_batch_size(module, run, None, 0.5 * peak(1))


def test_an_automatic_batch_size_is_chosen_once_a_run(
    toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*toy, "data.batch_size=auto", f"run_dir={tmp_path}", "trainer.max_steps=1"]
    monkeypatch.setattr(cli_train, "free_bytes", lambda cfg: 2**28)
    assert cli.run("train", argv) == 0
    chosen = yaml.safe_load((tmp_path / ".hydra/config.yaml").read_text())["data"]["batch_size"]
    assert chosen > 1

    monkeypatch.setattr(cli_train, "free_bytes", lambda cfg: 2**40)
    more = [*argv[:-1], "trainer.max_steps=2", "resume=force"]
    assert cli.run("train", more) == 0
    after = yaml.safe_load((tmp_path / ".hydra/config.yaml").read_text())["data"]["batch_size"]
    assert after == chosen


def test_an_image_of_a_mixture_counts_with_the_most_masks_that_any_of_its_sets_may_draw(
    toy: list[str],
) -> None:
    scenes = ("data.train.", "data.val.")
    argv = [one for one in toy if not one.startswith(scenes)]
    argv += ["data=mixture", "data.batch_size=3", "data.transforms.nuclei.max_masks=32"]
    _, run = cli_train.imagined(config.compose("train", argv))
    assert run.num_masks == 3 * 32

    argv.append("data.train_transform.max_masks=50")
    _, run = cli_train.imagined(config.compose("train", argv))
    assert run.num_masks == 3 * 50


def test_running_out_of_memory_ends_in_advice(
    toy: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_large(*args: object, **settings: object) -> None:
        torch.empty(2**55)

    monkeypatch.setattr(InteractiveTraining, "training_step", too_large)
    assert cli.run("train", [*toy, f"run_dir={tmp_path}", "trainer.max_steps=1"]) == 2
    said = capsys.readouterr().err
    assert "memory ran out" in said and "task.checkpoint_passes=true" in said


def test_an_attempt_that_reached_no_checkpoint_decides_no_batch_size(
    toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text("data: {batch_size: 77}")
    monkeypatch.setattr(cli_train, "free_bytes", lambda cfg: 2**28)
    argv = [*toy, "data.batch_size=auto", f"run_dir={tmp_path}", "trainer.max_steps=1"]
    assert cli.run("train", argv) == 0
    chosen = yaml.safe_load((tmp_path / ".hydra/config.yaml").read_text())["data"]["batch_size"]
    assert 1 < chosen < 77


def taught(toy: list[str], checkpoint: Path, *overrides: str, **settings: str) -> Distillation:
    """A distillation without weights."""
    argv = [*toy, "task=distill", f"teacher.checkpoint={checkpoint}", *overrides]
    teacher = Teacher.without_weights(checkpoint=str(checkpoint), **settings)
    with torch.device("meta"):
        module = config.instantiate(config.compose("train", argv).task, teacher=teacher)
    assert isinstance(module, Distillation)
    return module


def test_a_teachers_weights_and_answers_are_counted_and_kept_for_nothing(
    toy: list[str], toy_teacher: Path
) -> None:
    module = taught(toy, toy_teacher, "task.teaching.embeddings_share=0.5")
    run = Run(batch_size=2, num_masks=4)
    assert [(p.share, p.num_played) for p in phases(module, run)] == [(0.5, 0), (0.5, 4)]

    alone, asked = (step_cost(module, run, phase) for phase in phases(module, run))

    model = module.teacher.model
    num_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert alone.memory.teacher == asked.memory.teacher == num_bytes
    flops = [
        sum(op.flops for op in cost.operations if op.part.startswith("teacher"))
        for cost in (alone, asked)
    ]
    assert 0 < flops[0] < flops[1], "its encoder, and then its answers"
    kept = asked.memory.kept
    assert kept.get("teacher", 0) < kept["image encoder"] and kept["decoder passes"] > 0


def test_a_teacher_costs_no_more_once_the_truth_alone_is_learnt(
    toy: list[str], toy_teacher: Path
) -> None:
    shares = ("task.teaching.embeddings_share=0.25", "task.teaching.truth_share=0.5")
    module = taught(toy, toy_teacher, *shares)
    run = Run(batch_size=2, num_masks=4)
    found = phases(module, run)
    assert [(p.share, p.num_played, p.asks_teacher) for p in found] == [
        (0.25, 0, True),
        (0.25, 4, True),
        (0.5, 4, False),
    ]
    cost = step_cost(module, run, found[-1])
    assert not [op for op in cost.operations if op.part.startswith("teacher")]
    peaks = [step_cost(module, run, phase).memory.peak for phase in found]
    assert peaks[1] == max(peaks)


@pytest.mark.parametrize(("alone", "truth"), [(0.1, 0.9), (0.3, 0.7), (0.0, 1.0), (1.0, 0.0)])
def test_shares_that_come_to_one_leave_no_stretch_of_a_rounding_error(
    toy: list[str], toy_teacher: Path, alone: float, truth: float
) -> None:
    shares = (f"task.teaching.embeddings_share={alone}", f"task.teaching.truth_share={truth}")
    module = taught(toy, toy_teacher, *shares)
    found = phases(module, Run(batch_size=2, num_masks=4))
    expected = [(alone, 0, True), (truth, 4, False)]
    assert [(p.share, p.num_played, p.asks_teacher) for p in found] == [
        (pytest.approx(share), *rest) for share, *rest in expected if share
    ]


def test_embeddings_from_a_cache_cost_the_teacher_no_arithmetic(
    toy: list[str], toy_teacher: Path
) -> None:
    module = taught(toy, toy_teacher, cache="anywhere")
    run = Run(batch_size=2, num_masks=4)
    cost = step_cost(module, run, phases(module, run)[-1])
    assert sum(op.flops for op in cost.operations if op.part == "teacher") == 0
    assert cost.memory.teacher > 0, "validation asks it all the same"


def test_the_command_tells_the_cost_of_a_distillation(
    toy: list[str], toy_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*toy, "experiment=distill", f"teacher.checkpoint={toy_teacher}", "data=synthetic"]
    argv += ["estimate=true", "estimate_tflops=1", f"run_dir={tmp_path / 'run'}"]
    assert cli.run("train", argv) == 0
    text = capsys.readouterr().out
    for line in ("teacher: 0.", "teacher's weights", "embeddings alone", "masks played"):
        assert line in text
    assert not (tmp_path / "run").exists()


def test_the_host_has_memory_left() -> None:
    assert 2**20 < doctor.available_bytes() < 2**50
