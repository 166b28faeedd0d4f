"""The data engine's automatic stage against the mask generator alone, on the same images in one process.

The stage reads shards, decodes, filters, encodes run lengths, writes shards and manifests; the bare loop calls
the generator on images that lie in memory, decoded. With --workers N, N processes of each side by side.
"""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side

from data_engine.shard_claims import Share
from data_engine.shard_writer import finished
from data_engine.stages.fully_automatic import AutomaticStage
from sam_train import config
from sam_train.checkpoints.load import load_model
from sam_train.convert.tar_writer import TarWriter
from sam_train.data.sa1b import ShardSource, is_wanted
from sam_train.data.tar_samples import read_samples
from sam_train.models.sam import Sam

ENGINE, BARE = "the stage", "the generator alone"


def first_images(shard: str, count: int, parts: int, folder: Path) -> None:
    """Cuts the first images of a shard into `parts` shards of their own."""
    samples = list(islice(read_samples(shard, is_wanted), count))
    for part in range(parts):
        tar = TarWriter(folder / f"images-{part:06}.tar")
        for key, files, _ in samples[part::parts]:
            tar.add(key, files)
        tar.finish()


def node_of(preset: str, points: int | None) -> dict[str, Any]:
    overrides = ["images=none", "+stage=automatic", f"preset={preset}"]
    overrides += [f"preset.points_per_side={points}"] if points else []
    return config.plain(config.compose("segment", overrides).stage, resolve=True)


def run_stage(model: Sam, node: dict[str, Any], shards: Path, share: Share, out: Path) -> None:
    stage = config.instantiate(node)
    assert isinstance(stage, AutomaticStage)
    stage.run(model, str(shards), out, settings=node, share=share)


def bare_loop(model: Sam, node: dict[str, Any], images: list[np.ndarray]) -> int:
    generator = config.instantiate(node["generator"])(model)
    return sum(len(generator.find(image)[0].edges) for image in images)


def decoded(shards: Path, worker: int, workers: int) -> list[np.ndarray]:
    path = sorted(map(str, shards.glob("*.tar")))[worker::workers]
    records = ShardSource(path=path).records(epoch=0, reader=0, num_readers=1, shuffle=False)
    return [record.image for record in records]


def worker(
    name: str, node: dict[str, Any], number: int, shards: Path, arguments: Any, gate: Any, out: Path
) -> None:
    """One of several processes: gets ready, waits for the others, works."""
    side_by_side.settle(arguments.threads, arguments.device)
    model = load_model(arguments.checkpoint, device=arguments.device)
    images = decoded(shards, number, arguments.workers)
    bare_loop(model, node, images[:1])
    gate.wait()
    if name == BARE:
        bare_loop(model, node, images)
    else:
        run_stage(model, node, shards, Share(worker=number, num_workers=arguments.workers), out)
    gate.wait()


def seconds_together(name: str, node: dict[str, Any], shards: Path, arguments: Any) -> float:
    """Wall time until the last of the processes is through."""
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(arguments.workers + 1)
    with tempfile.TemporaryDirectory() as out:
        processes = [
            context.Process(
                target=worker, args=(name, node, number, shards, arguments, gate, Path(out))
            )
            for number in range(arguments.workers)
        ]
        for process in processes:
            process.start()
        gate.wait()
        start = time.perf_counter()
        gate.wait()
        seconds = time.perf_counter() - start
        for process in processes:
            process.join()
    return seconds


def measure(arguments: Any, shards: Path, node: dict[str, Any]) -> tuple[dict[str, float], str]:
    if arguments.workers > 1:
        best: dict[str, float] = {}
        for repeat in range(arguments.repeats):
            for name in (ENGINE, BARE)[:: -1 if repeat % 2 else 1]:
                took = seconds_together(name, node, shards, arguments)
                best[name] = min(best.get(name, took), took)
        return best, f"wall time, the best of {arguments.repeats}"
    model = load_model(arguments.checkpoint, device=arguments.device)
    images = decoded(shards, 0, 1)
    found: list[int] = []

    def stage() -> None:
        with tempfile.TemporaryDirectory() as out:
            run_stage(model, node, shards, Share(), Path(out))
            manifests = [finished(shard) for shard in Path(out).glob("*.tar")]
            found.append(sum(own.masks for own in manifests if own))

    runs = {ENGINE: stage, BARE: lambda: found.append(bare_loop(model, node, images))}
    took = side_by_side.medians(runs, arguments.repeats, device=arguments.device)
    return took, f"medians of {arguments.repeats}, {min(found)} to {max(found)} masks"


def main() -> None:
    parser = side_by_side.parser(__doc__.splitlines()[0], repeats=3)
    parser.add_argument("--checkpoint", default="sam_tiny")
    parser.add_argument("--preset", default="sam_tiny")
    parser.add_argument("--points", type=int, help="of the grid, a side; the preset's if not said")
    parser.add_argument("--images", type=int, default=8, help="of each set")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sets", nargs="+", default=["nuclei", "coco_panoptic"])
    arguments = parser.parse_args()
    side_by_side.settle(arguments.threads, arguments.device)
    node, rows, notes = node_of(arguments.preset, arguments.points), [], []
    for name in arguments.sets:
        shard = f"{config.data_root()}/{name}/val-000000.tar"
        with tempfile.TemporaryDirectory() as folder:
            first_images(shard, arguments.images, arguments.workers, Path(folder))
            took, note = measure(arguments, Path(folder), node)
        rows.append(
            [name, f"{took[ENGINE]:.2f}", f"{took[BARE]:.2f}", f"{took[ENGINE] / took[BARE]:.3f}"]
        )
        notes.append(f"{name}: {note}")
    report = "\n".join(
        [
            f"# The automatic stage, {datetime.date.today()}",
            "",
            f"{arguments.checkpoint}, preset={arguments.preset}, {node['generator']['points_per_side']} points "
            f"a side, {arguments.images} images of each set, {arguments.workers} worker(s). "
            f"{side_by_side.machine(arguments.device)}. {'; '.join(notes)}.",
            "",
            side_by_side.table(["", f"{ENGINE}, s", f"{BARE}, s", "ratio"], rows),
        ]
    )
    side_by_side.publish(report, "automatic-stage", arguments.out)


if __name__ == "__main__":
    main()
