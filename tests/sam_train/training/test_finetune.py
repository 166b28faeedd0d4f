"""Training from a checkpoint: whose model, which parts, and from what start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sam_train import cli, config
from sam_train.checkpoints.build import model_config
from sam_train.checkpoints.formats import RECORD_KEY, checkpoint_payload
from sam_train.models.sam import Sam
from sam_train.training.finetune import FROZEN_PARTS, freeze
from sam_train.training.interactive import InteractiveTraining

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
WITHOUT_ITS_SIZES = ("model.image_encoder", "model.mask_decoder")


@pytest.fixture
def own_checkpoint(toy: list[str], tmp_path: Path) -> Path:
    """A `.ckpt` of a toy model 16 and 32 wide, for 64 px."""
    torch.manual_seed(0)
    node = model_config("sam_tiny", [item for item in toy if item.startswith("model.")])
    model = config.instantiate(node)
    path = tmp_path / "own.ckpt"
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, RECORD_KEY: checkpoint_payload(node)}, path)
    return path


@pytest.fixture
def finetune(toy: list[str], own_checkpoint: Path, tmp_path: Path) -> Callable[..., int]:
    """`sam-train model=from_checkpoint checkpoint=... ...` for two steps on scenes."""
    run_dir = f"run_dir={tmp_path / 'run'}"
    small = [item for item in toy if not item.startswith(WITHOUT_ITS_SIZES)]
    steps = ["trainer.max_steps=2", "trainer.enable_progress_bar=false"]
    start = ["model=from_checkpoint", f"checkpoint={own_checkpoint}"]
    return lambda *more: cli.run("train", [*start, run_dir, *small, *steps, *more])


def trained(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_the_model_is_the_checkpoints_and_the_start_is_measured(
    finetune: Callable[..., int], own_checkpoint: Path, tmp_path: Path
) -> None:
    assert finetune("optim.layer_decay=0.8") == 0

    before, after = trained(own_checkpoint), trained(tmp_path / "run/checkpoints/last.ckpt")
    assert {name: t.shape for name, t in after.items()} == {n: t.shape for n, t in before.items()}
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert 0 <= metrics["start_mean_iou@1"] <= 1
    record = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)[RECORD_KEY]
    assert record["model"]["image_encoder"]["backbone"]["dims"] == [16, 32, 32, 32]


def test_another_input_size_can_be_asked_for(finetune: Callable[..., int], tmp_path: Path) -> None:
    assert finetune("model.image_encoder.img_size=96") == 0

    record = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)[RECORD_KEY]
    assert record["model"]["image_encoder"]["img_size"] == 96


def test_without_a_checkpoint_there_is_no_model_to_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run("train", ["model=from_checkpoint", f"run_dir={tmp_path}"]) == 2
    assert "checkpoint=PATH" in capsys.readouterr().err


def test_a_setting_the_stored_model_does_not_know_is_refused(
    finetune: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("model.image_encoder.drop_path_rate=0.1") == 2
    assert "drop_path_rate" in capsys.readouterr().err


def test_a_checkpoint_that_would_build_something_else_is_refused(
    finetune: Callable[..., int], own_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(own_checkpoint, weights_only=True)
    content[RECORD_KEY]["model"]["prompt_encoder"]["_target_"] = "os.system"
    torch.save(content, own_checkpoint)

    assert finetune() == 2
    assert "os.system" in capsys.readouterr().err


@pytest.mark.parametrize("mode", sorted(FROZEN_PARTS))
def test_only_what_a_mode_trains_moves(
    finetune: Callable[..., int], own_checkpoint: Path, tmp_path: Path, mode: str
) -> None:
    assert finetune(f"finetune={mode}") == 0

    before, after = trained(own_checkpoint), trained(tmp_path / "run/checkpoints/last.ckpt")
    for part in PARTS:
        names = [name for name in before if name.startswith(f"model.{part}.")]
        moved = any(not torch.equal(before[name], after[name]) for name in names)
        assert moved is (part not in FROZEN_PARTS[mode]), part


@pytest.mark.parametrize("mode", ["lora", "adapter"])
def test_what_is_not_built_yet_says_so(
    finetune: Callable[..., int], capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    assert finetune(f"finetune={mode}") == 2
    assert f"finetune={mode} is not built yet" in capsys.readouterr().err


def test_an_unknown_mode_names_those_there_are(
    finetune: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("finetune=encoder") == 2
    assert "full|decoder" in capsys.readouterr().err


def test_a_frozen_encoder_keeps_nothing_for_gradients_and_drops_no_path(tiny_sam: Sam) -> None:
    tiny_sam.train()
    tiny_sam.image_encoder.backbone.set_grad_checkpointing(True)

    freeze(tiny_sam, "decoder")

    image = torch.zeros(1, 3, 256, 256)
    assert not tiny_sam.image_encoder(image).requires_grad
    assert not any(module.training for module in tiny_sam.image_encoder.modules())
    assert tiny_sam.mask_decoder.training
    modules: Any = tiny_sam.image_encoder.modules()
    assert not any(getattr(module, "grad_checkpointing", False) for module in modules)


def test_a_frozen_encoder_stays_in_evaluation_through_a_run(
    finetune: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    step: Callable[..., Any] = InteractiveTraining.training_step

    def watched(self: InteractiveTraining, *args: Any) -> Any:
        model: nn.Module = self.model.image_encoder
        seen.append(any(module.training for module in model.modules()))
        return step(self, *args)

    monkeypatch.setattr(InteractiveTraining, "training_step", watched)

    assert finetune("finetune=decoder", "trainer.val_check_interval=1") == 0
    assert seen == [False, False]
