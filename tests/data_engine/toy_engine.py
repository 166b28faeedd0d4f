"""An engine at toy sizes: a model of 64 px, scenes of 96 px, trainings of a few steps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from data_engine import cli as data_engine_cli
from sam_train import cli, config
from sam_train.checkpoints.formats import RECORD_KEY, checkpoint_payload
from sam_train.convert.tar_writer import TarWriter
from sam_train.data.sa1b import ShardSource
from sam_train.data.shards import encode_record
from sam_train.data.synthetic import SyntheticSource
from sam_train.ops.files import write_atomically

MODEL = [
    "model.image_encoder.img_size=64",
    "model.image_encoder.out_chans=32",
    "model.image_encoder.backbone.depths=[1,1,1,1]",
    "model.image_encoder.backbone.dims=[16,32,32,32]",
    "model.mask_decoder.transformer.mlp_dim=64",
    "model.mask_decoder.iou_head_hidden_dim=32",
]
TRAINING = [
    "trainer.max_time=null",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "callbacks.last.every_n_steps=1",
    "callbacks.report.num_pictures=0",
    "data.num_workers=0",
    "data.batch_size=1",
    "data.train_transform.max_masks=4",
]
ANNOTATOR = [
    "annotator=simulated",
    "annotator.standards.good_enough=0.3",
    "annotator.standards.acceptable=0.1",
    "annotator.standards.wrong_below=0.05",
]
"""One that is content with what a toy model gives."""
SETTINGS = [
    "plan=nuclei_small",
    "preset=sam_tiny",
    "preset.points_per_side=3",
    "preset.crop_n_layers=0",
    "preset.pred_iou_thresh=0.0",
    "preset.stability_score_thresh=0.0",
    "measure.clicks.max_masks=4",
    "measure.clicks.simulator.num_corrections=1",
    "measure.clicks.num_cases=1",
    "measure.proposals.max_images=1",
    "measure.proposals.num_pictures=0",
    "measure.proposals.generator.points_per_side=2",
    "stages.semi_automatic.min_box_score=0.0",
    "stages.semi_automatic.min_predicted_iou=0.0",
    "stages.semi_automatic.min_stability=0.0",
    "stages.semi_automatic.max_masks=3",
    "images_per_shard=2",
    "promote=always",
    "device=cpu",
]


class InProcess:
    """Trains in this process, which has imported all that it takes."""

    def run(self, command: Sequence[str], run_dir: Path) -> Path:
        from data_engine.retrain import trained

        assert command[0] == "sam-train"
        if code := cli.run("train", command[1:]):
            raise ValueError(f"the training ended with exit code {code}")
        return trained(run_dir)


def write_toy_model(path: Path) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    node = config.compose("train", ["model=sam_tiny", *MODEL]).model
    model = config.instantiate(node)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    record = checkpoint_payload(config.plain(node, resolve=True))
    write_atomically(path, partial(torch.save, {RECORD_KEY: record, "state_dict": state}))
    return path


def write_scenes(path: Path, num_images: int) -> Path:
    """A shard of scenes of 64 px with their masks, no two alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = SyntheticSource(split="val", num_scenes=num_images, size=64, seed=0)
    tar = TarWriter(path)
    for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
        tar.add(record.key.replace("/", "_"), encode_record(record))
    tar.finish()
    return path


def toy_settings(trainer: str, steps: str, max_steps: int = 1) -> list[str]:
    """Overrides of `init`.

    Args:
        trainer: `_target_` of the trainer.
        steps: of the plan, in Hydra's syntax.
        max_steps: of each training.
    """
    training = [*TRAINING, f"trainer.max_steps={max_steps}"]
    quoted = ",".join(f"'{one}'" for one in training)
    return [
        *SETTINGS,
        f"training._target_={trainer}",
        f"plan.steps={steps}",
        "plan.defaults.recipe=retrain",
        f"++plan.defaults.overrides=[{quoted}]",
        f"++plan.defaults.detector_overrides=[{quoted}]",
    ]


QUIET = "{stage: assisted, num_images: 3, retrain: false}"
AUTOMATIC = "{stage: automatic, num_images: 3}"
UNMEASURED = ["held_out=0.3", "measure.clicks=null", "measure.proposals=null"]
"""Measuring takes the longest here."""


def write_toys(folder: Path) -> Path:
    """A model, toy.ckpt, and ten scenes, scenes.tar."""
    write_toy_model(folder / "toy.ckpt")
    write_scenes(folder / "scenes.tar", 10)
    return folder


def begun(folder: Path, toys: Path, *steps: str, overrides: Sequence[str] = ()) -> Path:
    """The folder of a new engine of the ten scenes, a copy of which lies beside it."""
    shutil.copy(toys / "scenes.tar", folder / "scenes.tar")
    settings = toy_settings("toy_engine.InProcess", f"[{','.join(steps)}]")
    places = [f"images={folder / 'scenes.tar'}", f"checkpoint={toys / 'toy.ckpt'}"]
    root = folder / "engine"
    assert call("init", f"root={root}", *places, *settings, *overrides) == 0
    return root


def call(*argv: str) -> int:
    """`data-engine`, in this process."""
    return data_engine_cli.main(list(argv))


def simulated(root: Path, *overrides: str) -> int:
    """A round whose people are simulated."""
    return call("round", f"root={root}", *ANNOTATOR, *overrides)


def keys_of(place: Path) -> set[str]:
    """The images of a shard, or of all shards of an engine."""
    paths = [place] if place.is_file() else sorted(place.glob("rounds/*/shards/*.tar"))
    return keys_at(ShardSource(path=[str(path) for path in paths]))


def keys_at(source: ShardSource) -> set[str]:
    """The images of a source."""
    found = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
    return {record.key for record in found}
