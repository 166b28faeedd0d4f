"""Every recipe composes, and runs two steps on the CPU when it is made small."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

from sam_train import cli, config

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
SMALL = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.max_time=null",
    "trainer.enable_progress_bar=false",
    "data.num_workers=0",
    "data.batch_size=1",
    "data.train_transform.max_masks=2",
    "data.max_masks_per_batch=null",
    "data.max_val_masks=2",
]


@pytest.fixture
def ctrl_c_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_there_are_recipes() -> None:
    assert "quickstart" in RECIPES


@pytest.mark.parametrize("root", ["train", "eval", "precompute"])
def test_a_command_composes_as_it_stands(root: str) -> None:
    assert isinstance(config.compose(root), DictConfig)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_and_is_named_after_its_file(name: str) -> None:
    cfg = config.compose("train", [f"experiment={name}"])

    assert cfg.run_dir == f"outputs/{name}"
    config.plain(cfg, resolve=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_its_command_and_says_what_it_costs(name: str) -> None:
    lines = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    head = "\n".join(line for line in lines[:12] if line.startswith("#"))

    assert f"sam-train experiment={name}" in head
    assert "# Hardware: " in head
    assert any(unit in head for unit in ("minute", "hour", "day"))


@pytest.mark.usefixtures("ctrl_c_restored")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_two_steps(
    name: str, tmp_path: Path, tiny_sam_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config.compose("train", [f"experiment={name}"])
    small = [*SMALL, *_small_data(cfg)]
    if "teacher" in cfg:
        small.append(f"teacher.checkpoint={tiny_sam_file}")

    code = cli.run("train", [f"experiment={name}", f"run_dir={tmp_path}", *small])

    assert code == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics["steps"] == 2
    assert 0 <= metrics["mean_iou@1"] <= 1


def _small_data(cfg: DictConfig) -> list[str]:
    """Few scenes; for a recipe on real images, a skip that says what is missing."""
    if "num_scenes" in cfg.data.train:
        return ["data.train.num_scenes=4", "data.val.num_scenes=2"]
    paths = config.plain(cfg.data, resolve=True)["train"]["path"]
    folders = [Path(path).parent for path in ([paths] if isinstance(paths, str) else paths)]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        pytest.skip(f"no {', '.join(missing)}: set SAM_TRAIN_DATA to run this recipe's two steps")
    return []
