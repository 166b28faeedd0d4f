"""A box detector's training at toy sizes: it goes on exactly, and its checkpoint stands alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from sam_train import cli, config
from sam_train.checkpoints.detector import load_detector, start_detector
from sam_train.checkpoints.files import CheckpointError
from sam_train.checkpoints.load import load_model
from sam_train.models.box_detector import EncoderBoxDetector, ResNetBoxDetector
from sam_train.training.callbacks import Report, Speed
from sam_train.training.saving import BestCheckpoint, LastCheckpoint

DETECTOR = [
    "task=detector",
    "detector.width=16",
    "detector.hidden_dim=32",
    "detector.num_levels=3",
    "callbacks.best.monitor=box_average_recall@100",
    "data.max_val_masks=null",
]


class KeepSteps(lightning.Callback):
    """Keeps the checkpoint of every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")


@pytest.fixture(scope="module")
def sam_file(toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Sam at toy sizes, as sam-train writes it."""
    folder = tmp_path_factory.mktemp("sam")
    done = cli.run("train", [*toy, "trainer.max_steps=1", f"run_dir={folder}"])
    assert done == 0
    return folder / "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def run_folder(toy: list[str], sam_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the command."""
    folder = tmp_path_factory.mktemp("detector")
    few = ["trainer.max_steps=2", "callbacks.report.num_pictures=1"]
    argv = [*toy, *DETECTOR, *few, f"checkpoint={sam_file}", f"run_dir={folder}"]
    assert cli.run("train", argv) == 0
    return folder


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)


def run(toy: list[str], sam_file: Path, folder: Path, resume: Path | None = None) -> Any:
    torch.manual_seed(5)
    cfg = config.compose("train", [*toy, *DETECTOR, f"run_dir={folder}"])
    training = config.instantiate(cfg.task)
    training.model_config = config.plain(cfg.task.model, resolve=True)
    if resume is None:
        training.start_from(str(sam_file))
    report = Report(run_dir=str(folder), num_pictures=0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        max_epochs=-1,
        callbacks=[
            Speed(),
            KeepSteps(folder),
            LastCheckpoint(path=str(folder / "last.ckpt"), every_n_steps=1),
            BestCheckpoint(path=str(folder / "best.ckpt"), monitor="box_average_recall@100"),
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


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    toy: list[str], sam_file: Path, tmp_path: Path
) -> None:
    undisturbed, scores = run(toy, sam_file, tmp_path / "one")

    for step in (1, 3):
        resume = tmp_path / "one" / f"step{step}.ckpt"
        resumed, resumed_scores = run(toy, sam_file, tmp_path / f"two{step}", resume)

        for name, tensor in undisturbed.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), name
        assert scores == resumed_scores


def test_a_run_writes_what_a_run_writes(run_folder: Path) -> None:
    written = json.loads((run_folder / "metrics.json").read_text())

    assert written["protocol"] == "detection"
    assert written["num_masks"] > 0
    assert {"box_average_recall@100", "start_box_average_recall@100", "steps"} <= set(
        written["metrics"]
    )
    assert (run_folder / "figures/boxes_step000002.png").is_file()
    assert (run_folder / "figures/curves.png").is_file()
    assert "val/box_average_recall@100" in (run_folder / "metrics.csv").read_text()


def test_the_checkpoint_stands_alone(run_folder: Path, sam_file: Path, image: np.ndarray) -> None:
    path = run_folder / "checkpoints/best.ckpt"

    alone = load_detector(path)
    on_sam = load_detector(path, sam=load_model(sam_file))

    sam = load_model(sam_file)
    for name, tensor in sam.image_encoder.state_dict().items():
        assert torch.equal(tensor, alone.image_encoder.state_dict()[name]), name
    (one,), (two,) = alone.detect([image]), on_sam.detect([image])
    assert len(one.boxes) > 0
    assert torch.equal(one.boxes, two.boxes)
    assert not alone.training


def test_the_encoder_is_in_it_once_and_nothing_else_of_the_sam(run_folder: Path) -> None:
    state = torch.load(run_folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]

    parts = {name.split(".")[1] for name in state}
    assert parts == {"image_encoder", "backbone", "rpn", "roi_heads"}
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_a_given_sam_lends_its_encoder(run_folder: Path, sam_file: Path) -> None:
    sam = load_model(sam_file)

    detector = load_detector(run_folder / "checkpoints/best.ckpt", sam=sam)

    assert isinstance(detector, EncoderBoxDetector)
    assert detector.image_encoder is sam.image_encoder


def test_another_encoder_is_refused(run_folder: Path, sam_file: Path) -> None:
    path = run_folder / "checkpoints/best.ckpt"
    other = load_model(sam_file)
    with torch.no_grad():
        next(other.image_encoder.parameters()).add_(1e-3)

    with pytest.raises(CheckpointError, match="was trained on another image encoder"):
        load_detector(path, sam=other)
    with pytest.raises(CheckpointError, match="was trained on another image encoder"):
        load_detector(path, sam=load_model(sam_file, img_size=128))


def test_what_is_no_detector_is_refused_and_a_detector_is_no_sam(
    run_folder: Path, sam_file: Path, tmp_path: Path
) -> None:
    path = run_folder / "checkpoints/best.ckpt"

    with pytest.raises(CheckpointError, match="holds no box detector"):
        load_detector(sam_file)
    with pytest.raises(FileNotFoundError, match="no such detector"):
        load_detector(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="holds a box detector, not a Sam"):
        load_model(path)


@pytest.mark.parametrize("part", ["image_encoder", "rpn"])
def test_a_detector_with_weights_changed_or_gone_is_refused(
    run_folder: Path, tmp_path: Path, part: str
) -> None:
    content = torch.load(run_folder / "checkpoints/best.ckpt", weights_only=True)
    name = next(n for n in content["state_dict"] if n.startswith(f"model.{part}."))
    if part == "rpn":
        del content["state_dict"][name]
    else:
        content["state_dict"][name] += 1
    torch.save(content, tmp_path / "changed.ckpt")

    expected = "does not fit" if part == "rpn" else "is not the one that its record names"
    with pytest.raises(CheckpointError, match=expected):
        load_detector(tmp_path / "changed.ckpt")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("estimate=true", "what prompts cost"),
        ("finetune=mask_decoder", "which this model has not"),
        ("callbacks.best.monitor=mean_iou@1", "callbacks.best.monitor is one of"),
    ],
)
def test_a_wrong_setting_ends_in_a_sentence(
    toy: list[str],
    sam_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    message: str,
) -> None:
    argv = [*toy, *DETECTOR, f"checkpoint={sam_file}", f"run_dir={tmp_path}", argument]

    code = cli.run("train", argv)

    said = capsys.readouterr().err
    assert code == 2
    assert message in said and "Traceback" not in said


@pytest.mark.slow
def test_published_weights_of_torchvision_start_the_full_detector(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = ResNetBoxDetector(img_size=64)
    state = {
        name: torch.zeros(91, 1024) if "cls_score.weight" in name else tensor
        for name, tensor in published.state_dict().items()
    }
    torch.save(state, tmp_path / "published.pth")
    torch.manual_seed(1)
    detector = ResNetBoxDetector(img_size=64)

    start_detector(detector, str(tmp_path / "published.pth"))

    started = detector.state_dict()
    for name, tensor in published.state_dict().items():
        assert torch.equal(tensor, started[name]) != name.startswith("roi_heads.box_predictor.")
