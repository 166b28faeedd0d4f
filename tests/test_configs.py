"""Every recipe composes, and runs two steps on the CPU when it is made small."""

from __future__ import annotations

import io
import json
import re
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from sam_train import cli, config
from sam_train.checkpoints.build import model_config
from sam_train.checkpoints.formats import RECORD_KEY, checkpoint_payload
from sam_train.data.shards import encode_record
from sam_train.models.sam import Sam
from sam_train.structures import ImageRecord

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
SMALL = [
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.num_nodes=1",
    "trainer.max_steps=2",
    "trainer.max_time=null",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "callbacks.report.num_pictures=1",
    "data.num_workers=0",
    "data.batch_size=1",
    "data.max_masks_per_batch=null",
    "data.max_val_masks=2",
]
SMALL_VIT = [
    "model.image_encoder.img_size=64",
    "model.image_encoder.embed_dim=32",
    "model.image_encoder.depth=2",
    "model.image_encoder.num_heads=2",
    "model.image_encoder.global_attn_indexes=[1]",
    "model.image_encoder.out_chans=32",
    "model.mask_decoder.transformer.mlp_dim=64",
]
TOLD = {
    "detector": ["checkpoint=own.ckpt"],
    "distill": ["teacher.checkpoint=own.ckpt"],
    "finetune": ["checkpoint=own.ckpt", "data.path=own.tar"],
    "retrain": ["checkpoint=own.ckpt", "data.path=own.tar"],
    "retrain_small": ["checkpoint=own.ckpt", "data.path=own.tar"],
    "retrain_natural": ["checkpoint=own.ckpt", "data.path=own.tar"],
    "sa1b_automatic": ["data.path=own.tar"],
}
"""What only the user of a recipe can say."""
HEADLINES = dict.fromkeys(("detector", "detector_resnet50"), "box_average_recall@100")
"""The score of recipes that are not about clicks."""
FULL_SIZES = {
    "sa1b_vit_b": 93_735_472,
    "sa1b_vit_l": 312_342_832,
    "sa1b_vit_h": 641_090_608,
    "sa1b_automatic": 642_670_128,
}
"""Parameters: the published ones', and with a layer more in the decoder."""


@pytest.fixture
def ctrl_c_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def shard(tmp_path: Path, synthetic_scenes: list[ImageRecord]) -> Path:
    """A tar of four scenes."""
    path = tmp_path / "scenes.tar"
    with tarfile.open(path, "w") as tar:
        for record in synthetic_scenes:
            for suffix, data in encode_record(record).items():
                entry = tarfile.TarInfo(f"{record.key}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_sam: Sam) -> Path:
    """`model=sam_tiny` as sam-train keeps it."""
    path = tmp_path / "tiny.ckpt"
    state = {f"model.{name}": tensor for name, tensor in tiny_sam.state_dict().items()}
    torch.save(
        {"state_dict": state, RECORD_KEY: checkpoint_payload(model_config("sam_tiny"))}, path
    )
    return path


def test_there_are_recipes() -> None:
    assert "quickstart" in RECIPES


@pytest.mark.parametrize("root", ["train", "eval", "precompute", "segment"])
def test_a_command_composes_as_it_stands(root: str) -> None:
    assert isinstance(config.compose(root), DictConfig)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_and_is_named_after_its_file(name: str) -> None:
    cfg = composed(name)

    assert cfg.run_dir == f"outputs/{name}"
    config.check_complete(cfg)
    config.plain(cfg, resolve=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_its_command_and_says_what_it_costs(name: str) -> None:
    lines = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    head = "\n".join(line for line in lines[:12] if line.startswith("#"))

    assert f"sam-train experiment={name}" in head
    assert "# Hardware: " in head
    assert any(unit in head for unit in ("minute", "hour", "day"))
    score = head[head.index("# Score") :]
    assert re.search(r"0\.\d+", score) or "not measured" in score


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_at_full_size_without_memory(name: str) -> None:
    with torch.device("meta"):
        model = config.instantiate(composed(name).model)

    assert isinstance(model, Sam)
    assert all(parameter.is_meta for parameter in model.parameters())
    if name in FULL_SIZES:
        assert sum(p.numel() for p in model.parameters()) == FULL_SIZES[name]


@pytest.mark.parametrize("name", ["sa1b_vit_b", "sa1b_vit_l", "sa1b_vit_h", "sa1b_automatic"])
def test_the_papers_batch_comes_of_its_gpus(name: str) -> None:
    cfg = composed(name)

    gpus = cfg.trainer.num_nodes * cfg.trainer.devices
    images = gpus * cfg.data.batch_size * cfg.trainer.accumulate_grad_batches
    assert (gpus, images) == (
        (256, 256) if name in ("sa1b_vit_h", "sa1b_automatic") else (128, 128)
    )


@pytest.mark.usefixtures("ctrl_c_restored")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_two_steps(
    name: str, tmp_path: Path, shard: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*SMALL, *_small_parts(composed(name), shard, checkpoint)]

    code = cli.run("train", [f"experiment={name}", f"run_dir={tmp_path / 'run'}", *small])

    assert code == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert metrics["steps"] == 2
    assert 0 <= metrics[HEADLINES.get(name, "mean_iou@1")] <= 1


def composed(name: str) -> DictConfig:
    """A recipe with what only its user can say; a model that a checkpoint holds is `sam_tiny`."""
    cfg = config.compose("train", [f"experiment={name}", *TOLD.get(name, [])])
    if cfg.model.get("from_checkpoint"):
        config.replace_node(cfg, "model", model_config("sam_tiny"))
    return cfg


def _small_parts(cfg: DictConfig, shard: Path, checkpoint: Path) -> list[str]:
    """Overrides that make the data few, and a ViT narrow."""
    small = [f"checkpoint={checkpoint}"] if cfg.checkpoint else []
    if "teacher" in cfg:
        small.append(f"teacher.checkpoint={checkpoint}")
    if cfg.model.image_encoder._target_.endswith("SamVitEncoder"):
        small += SMALL_VIT
    if "img_size" in cfg.get("detector", {}):
        small.append("detector.img_size=64")
    if "path" in cfg.data:  # the user's own shards
        small += [f"data.path={shard}", f"data.val_path=[{shard}]"]
    return [*small, *_few_masks(cfg), *_few_scenes(cfg)]


def _few_masks(cfg: DictConfig) -> list[str]:
    parts = [f"transforms.{name}" for name in cfg.data.get("transforms", {})]
    return [f"++data.{part}.max_masks=2" for part in ("train_transform", *parts)]


def _few_scenes(cfg: DictConfig) -> list[str]:
    """Few scenes; for a recipe on real images, a skip that says what is missing."""
    small = []
    sets = cfg.data.get("sets")
    nodes = {f"sets.{name}.": sets[name] for name in sets} if sets else {"": cfg.data}
    for prefix, node in nodes.items():
        for role in ("train", "val"):
            source = node[role].get("source", node[role])  # behind a list of what is allowed
            if "num_scenes" in source:
                small.append(f"data.{prefix}{role}.num_scenes=4")
            elif "path" not in cfg.data:
                _skip_if_missing(config.plain(source, resolve=True)["path"])
    return small


def _skip_if_missing(paths: str | list[str]) -> None:
    folders = [Path(path).parent for path in ([paths] if isinstance(paths, str) else paths)]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        pytest.skip(f"no {', '.join(missing)}: set SAM_TRAIN_DATA to run this recipe's two steps")
