"""A whole plan of the data engine on real images, from a model that has seen synthetic scenes only.

    python benchmarks/engine_rounds.py nuclei

Without --checkpoint that model is trained first (`sam-train experiment=quickstart`, 8 minutes). People are simulated. After the rounds the automatic shards are checked, read by a plain reader of SA-1B, and two
models are trained from the same start by the same recipe, with as many steps as all rounds together: one on what
the engine made, one on the ground truth of the same images. Called again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
from pycocotools import mask as coco_mask

from data_engine import cli
from data_engine.code_version import code_version
from data_engine.engine import Engine
from data_engine.records import Model
from data_engine.retrain import trained
from data_engine.shards_of_round import Labelled, whole_shards, write_shards
from sam_train import cli_common, config
from sam_train.checkpoints.load import load_model
from sam_train.data.sa1b import ShardSource, is_wanted
from sam_train.data.tar_samples import read_samples
from sam_train.ops import rle
from sam_train.structures import Annotation

SETS = {"nuclei": ("nuclei",), "natural": ("coco_panoptic", "balloon", "fruits_nuts")}
METRICS = ("mean_iou@1", "mean_iou@3", "box_mean_iou", "average_recall@10", "average_recall@100")


def paths(name: str, split: str) -> str:
    """The shards of a set's split, in Hydra's syntax."""
    root = Path(config.data_root()).absolute()
    return "[" + ",".join(f"{root}/{own}/{split}-*.tar" for own in SETS[name]) + "]"


def run_rounds(arguments: argparse.Namespace, root: Path) -> None:
    """`data-engine init` and `round`, as a user calls them."""
    if not (root / "engine.yaml").exists():
        call = [
            *("init", f"root={root}", f"images={paths(arguments.set, 'train')}"),
            f"held_out_images={paths(arguments.set, 'val')}",
            f"checkpoint={os.path.abspath(arguments.checkpoint or model_of_scenes(root.parent))}",
            *(f"plan={arguments.set}_small", "annotator=simulated", *arguments.settings),
        ]
        _data_engine(call)
    _data_engine(["round", f"root={root}", "all=true"])


def model_of_scenes(work: Path) -> Path:
    """Trains on synthetic scenes, as `make quickstart` does; a training that was stopped goes on."""
    run_dir = work / "scenes"
    if not (run_dir / "metrics.json").exists():
        _train(["experiment=quickstart", f"run_dir={run_dir}"], 1)
    return trained(run_dir)


def _train(arguments: Sequence[str], threads: int) -> None:
    command = [sys.executable, "-m", "sam_train.cli", "train", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def _data_engine(call: Sequence[str]) -> None:
    print("data-engine", *call, flush=True)
    if code := cli.main(call):
        raise SystemExit(code)


def plainly_read(folder: Path) -> tuple[int, int]:
    """Images and masks of SA-1B shards, read by nothing but tarfile, json and pycocotools.

    Raises:
        AssertionError: a mask is not as SA-1B has it.
    """
    num_images = num_masks = 0
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            names = set(tar.getnames())
            for name in sorted(one for one in names if one.endswith(".json")):
                content = json.load(tar.extractfile(name))  # type: ignore[arg-type]
                image = content["image"]
                assert image["file_name"] in names, image
                num_images += 1
                for own in content["annotations"]:
                    _check_mask(own, image)
                    num_masks += 1
    return num_images, num_masks


def _check_mask(own: Mapping[str, Any], image: Mapping[str, Any]) -> None:
    assert own["segmentation"]["size"] == [image["height"], image["width"]], own["id"]
    mask = coco_mask.decode(own["segmentation"])
    rows, columns = np.nonzero(mask)
    x, y, width, height = own["bbox"]
    assert int(mask.sum()) == own["area"] > 0, own["id"]
    assert x <= columns.min() and columns.max() <= x + width, own["id"]
    assert y <= rows.min() and rows.max() <= y + height, own["id"]
    # SAM's estimate of the IoU is not bounded by 1, in the published files neither.
    assert own["predicted_iou"] > 0 and 0 < own["stability_score"] <= 1, own["id"]
    assert len(own["point_coords"]) == 1 and len(own["crop_box"]) == 4, own["id"]


def checked(folder: Path, out: Path) -> str:
    """What `sam-convert check=` says at its end."""
    command = [sys.executable, "-m", "sam_train.cli", "convert", f"check={folder}", f"out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"sam-convert check={folder} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def truth_shards(engine: Engine, folder: Path) -> Path:
    """The images of all the engine's shards with their ground truth, as shards."""
    shards = [engine.path(own.path) for own in whole_shards(engine) if own.num_masks]
    keys = [sample.key for path in shards for sample in read_samples(str(path), is_wanted)]
    images = engine.store.images_by_key(keys)
    labelled = (
        Labelled(
            images[key],
            [
                Annotation(id=0, rle=one, bbox=rle.bbox(one), area=rle.area(one))
                for one in engine.truth(images[key])
            ],
        )
        for key in sorted(images)
    )
    write_shards(folder, "truth", labelled, images_per_shard=100, made_with={})
    return folder


def steps_so_far(engine: Engine) -> int:
    """Optimiser steps of all retrainings of the segmentation model."""
    total = 0
    for round_ in engine.store.rounds():
        metrics = engine.round_folder(round_.number) / "training_sam" / "metrics.json"
        if metrics.is_file():
            total += int(json.loads(metrics.read_text())["metrics"]["steps"])
    return total


def trained_on(
    engine: Engine, data: Sequence[str], steps: int, run_dir: Path, threads: int
) -> Mapping[str, float]:
    """Trains from the engine's first model by its recipe, and measures as the engine does."""
    first = engine.path(engine.models()[0].path)
    _train(
        [
            *(f"experiment={engine.steps[-1].recipe}", f"checkpoint={first}"),
            *(f"trainer.max_steps={steps}", "trainer.limit_val_batches=0"),
            *(*data, f"run_dir={run_dir}"),
        ],
        threads,
    )
    protocols = config.instantiate(engine.settings["measure"])
    model = load_model(trained(run_dir))
    return dict(protocols.run(model, ShardSource(path=str(engine.root / "held_out")), run_dir))


def engine_data(engine: Engine) -> list[str]:
    """All that the engine made, as the recipe of its last retraining has it."""
    shards = [one for one in whole_shards(engine) if one.num_masks]
    arguments = ["data=rounds"]
    for name, is_automatic, weight in (("human", False, 10), ("automatic", True, 1)):
        own = [one for one in shards if (one.source == "automatic") == is_automatic]
        folders = sorted({str(engine.path(one.path).parent) for one in own})
        share = weight * sum(one.num_images for one in own)
        arguments += [
            f"data.sets.{name}.path=[{','.join(folders)}]",
            f"data.sets.{name}.val_path={engine.root / 'held_out'}",
            f"data.weights.{name}={share}",
        ]
    return arguments


def rows_of_models(models: Sequence[Model]) -> Iterator[list[str]]:
    """A row of the table for each model of the engine."""
    for own in models:
        name = "start: scenes only" if own.round is None else f"after round {own.round}"
        yield [name if own.promoted else f"{name} (not taken)", *_scores(own.metrics)]


def rows_of_comparison(engine: Engine, steps: int, work: Path, threads: int) -> Iterator[list[str]]:
    """Rows of two models trained anew: on what the engine made, and on the truth of the same images."""
    truth = truth_shards(engine, work / "truth_shards")
    data = {
        "engine": engine_data(engine),
        "truth": ["data=shards", f"data.path={truth}", f"data.val_path={engine.root / 'held_out'}"],
    }
    found = {
        name: trained_on(engine, own, steps, work / name, threads) for name, own in data.items()
    }
    yield [f"anew, {steps} steps, on all that the engine made", *_scores(found["engine"])]
    yield [f"anew, {steps} steps, on the ground truth", *_scores(found["truth"])]
    ratios = [f"{found['engine'][name] / found['truth'][name]:.3f}" for name in METRICS]
    yield ["ratio of these two", *ratios]


def _scores(metrics: Mapping[str, float]) -> list[str]:
    return [f"{metrics[name]:.3f}" if name in metrics else "" for name in METRICS]


def rows_of_rounds(root: Path) -> Iterator[list[str]]:
    """A row for each round, from its `report.json`."""
    for path in sorted((root / "rounds").glob("*/report.json")):
        own = json.loads(path.read_text())
        names = "masks_per_image seconds_per_mask seconds_per_mask_all_in clicks_per_mask".split()
        figures = ["" if own[name] is None else f"{own[name]:.2f}" for name in names]
        share = "" if own["share_automatic"] is None else f"{own['share_automatic']:.2f}"
        yield [
            *(str(own["round"]), own["stage"], str(own["images"]), str(own["masks"])),
            *(*figures, share),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", nargs="?", choices=sorted(SETS), default="nuclei")
    parser.add_argument("settings", nargs="*", help="NAME=VALUE for data-engine init")
    parser.add_argument("--checkpoint", help="the model to begin with; trained first, if not said")
    parser.add_argument("--work", type=Path, help="folder of all this; outputs/engine_rounds/SET")
    parser.add_argument("--rounds-only", action="store_true", help="no models trained anew")
    parser.add_argument(
        "--steps", type=int, help="of these; as many as the rounds had, if not said"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder that also gets the tables as a file")
    arguments = parser.parse_args()
    cli_common.prepare_host()
    side_by_side.settle(arguments.threads, "cpu")
    work = (arguments.work or Path("outputs/engine_rounds") / arguments.set).absolute()
    root = work / "engine"
    run_rounds(arguments, root)
    engine = Engine.open(root)
    spans = [(one.finished_at or 0) - one.created_at for one in engine.store.rounds()]
    took = f"{sum(spans) / 60:.0f} minutes"
    shards = next(
        engine.round_folder(one.number) / "shards"
        for one in engine.store.rounds()
        if one.stage == "automatic"
    )
    said = checked(shards, work / "check")
    num_images, num_masks = plainly_read(shards)
    steps = steps_so_far(engine)
    models = list(rows_of_models(engine.models()))
    if not arguments.rounds_only:
        anew = arguments.steps or steps
        models += rows_of_comparison(engine, anew, work, arguments.threads)
    rounds = "round stage images masks masks/image s/mask s/mask,_all_in clicks/mask automatic"
    report = "\n".join(
        [
            f"# The data engine on {arguments.set}, {datetime.date.today()}",
            "",
            f"Annotators are simulated. {side_by_side.machine('cpu')}; the rounds took {took}. {code_version()}.",
            f"Scores on the held-out images; the retrainings have {steps} steps together.",
            "",
            side_by_side.table(["model", *METRICS], models),
            "",
            side_by_side.table(
                [one.replace("_", " ") for one in rounds.split()], list(rows_of_rounds(root))
            ),
            "",
            f"The automatic shards in a plain reader of SA-1B: {num_images} images, {num_masks} masks. "
            "`sam-convert check` of them:",
            "",
            *(f"    {line}" for line in said.splitlines()),
        ]
    )
    side_by_side.publish(report, f"engine-{arguments.set}", arguments.out)


if __name__ == "__main__":
    main()
