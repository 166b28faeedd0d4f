"""Samples per second of the training loader against a bare loop that only decodes.

    python benchmarks/data_loading.py                           # large images made on the spot, as SA-1B's
    python benchmarks/data_loading.py 'data/nuclei/train-*.tar' --img-size 256 --max-masks 16
    python benchmarks/data_loading.py 'data/nuclei/train-*.tar' --memory 10000   # the readers' memory
    python benchmarks/data_loading.py --decoding                # reduced JPEG decoding against the full

The bare loop has the files and the run lengths in memory already; it decodes the JPEG (Pillow) and as
many masks as the loader would draw (pycocotools) and throws them away, in as many processes. Both take
turns; rates are by the clock and by the CPU time of the readers, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import webdataset
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sam_train.data.datamodule import SamDataModule
from sam_train.data.sa1b import ShardSource
from sam_train.data.shards import decode_record, decode_reduced, encode_record
from sam_train.data.tar_samples import read_samples
from sam_train.data.transforms import ToSample
from sam_train.ops import rle
from sam_train.structures import Annotation, ImageRecord

LARGE_SIZE, LARGE_MASKS = (1500, 2250), 100


class Rate(NamedTuple):
    """Samples per second, by the clock and by the CPU time of all readers."""

    by_clock: float
    by_cpu: float


class BareLoop(IterableDataset):
    """Decodes images and masks, again and again, and gives nothing but a sign of life."""

    def __init__(self, paths: list[str], max_masks: int) -> None:
        self.images, self.masks = [], []
        for sample in itertools.chain.from_iterable(read_samples(p, lambda _: True) for p in paths):
            record = decode_record(sample.key, sample.files)
            self.images.append(next(data for name, data in sample.files.items() if name != "json"))
            drawn = record.annotations[:max_masks]
            self.masks.append([dict(annotation.rle) for annotation in drawn])

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        assert worker is not None
        for i in itertools.cycle(range(worker.id, len(self.images), worker.num_workers)):
            with Image.open(io.BytesIO(self.images[i])) as image:
                np.asarray(image.convert("RGB"))
            for mask in self.masks[i]:
                coco_mask.decode(mask)
            yield 1


def make_large_shard(path: Path, number: int) -> None:
    """A shard of pictures of SA-1B's size: blurred noise of all scales, with a hundred wobbly outlines."""
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as writer:
        for index in range(number):
            record = large_record(f"large-{index:03}", rng)
            files: dict[str, Any] = {**encode_record(record, image_id=index, quality=85)}
            writer.write({"__key__": record.key, **files})


def large_record(key: str, rng: np.random.Generator) -> ImageRecord:
    height, width = LARGE_SIZE
    pixels = np.zeros((height, width, 3), np.float32)
    for scale in (4, 16, 64, 256):
        coarse = rng.normal(0, 12, (height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels += 128 + rng.normal(0, 3, pixels.shape)
    annotations = []
    for id_ in range(LARGE_MASKS):
        mask, colour = wobbly_mask(rng), rng.uniform(-50, 50, 3)
        pixels[mask] += colour
        code = rle.encode(mask)
        x, y, w, h = rle.bbox(code)
        extra = {"crop_box": (0.0, 0.0, float(width), float(height))}
        annotations.append(
            Annotation(
                id=id_,
                rle=code,
                bbox=(x, y, w, h),
                area=float(mask.sum()),
                predicted_iou=0.95,
                stability_score=0.97,
                point_coords=((x + w / 2, y + h / 2),),
                **extra,
            )
        )
    image = pixels.clip(0, 255).astype(np.uint8)
    return ImageRecord(key, LARGE_SIZE, tuple(annotations), lambda: image)


def wobbly_mask(rng: np.random.Generator) -> np.ndarray:
    height, width = LARGE_SIZE
    radius = np.exp(rng.uniform(np.log(15), np.log(400)))
    center = rng.uniform((0, 0), (width, height))
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    wobble = 1 + sum(rng.normal(0, 0.15) * np.cos(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5))
    outline = center + radius * wobble[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    mask = np.zeros(LARGE_SIZE, np.uint8)
    cv2.fillPoly(mask, [outline.astype(np.int32)], 1)
    return mask.astype(bool)


def our_loader(paths: list[str], arguments: argparse.Namespace) -> Any:
    source = ShardSource(path=paths, cache_mb=0)
    side = arguments.img_size
    data = SamDataModule(
        train=source,
        val=source,
        train_transform=ToSample(img_size=side, mask_size=side // 4, max_masks=arguments.max_masks),
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
    )
    return data.train_dataloader()


class Reader:
    """A loader's stream, and what its processes use."""

    def __init__(self, loader: Any) -> None:
        before = set(multiprocessing.active_children())
        self.stream = iter(loader)
        next(self.stream)
        self.processes = [p.pid for p in set(multiprocessing.active_children()) - before]

    def rate(self, samples: int) -> Rate:
        """Takes at least as many samples."""
        for _ in range(2 * len(self.processes) + 1):
            next(self.stream)  # made while another reader had its turn
        count, start, cpu = 0, time.perf_counter(), self.cpu_seconds()
        while count < samples:
            item = next(self.stream)
            count += item if isinstance(item, int) else len(item.keys)
        return Rate(
            count / (time.perf_counter() - start), count / max(self.cpu_seconds() - cpu, 1e-9)
        )

    def cpu_seconds(self) -> float:
        total = 0
        for pid in self.processes:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> list[float]:
        """What each process holds, less what files are mapped into it."""
        page_mib = os.sysconf("SC_PAGE_SIZE") / 2**20
        statm = [Path(f"/proc/{pid}/statm").read_text().split() for pid in self.processes]
        return [(int(fields[1]) - int(fields[2])) * page_mib for fields in statm]


def compare(paths: list[str], arguments: argparse.Namespace) -> str:
    loader = DataLoader(
        BareLoop(paths, arguments.max_masks), batch_size=None, num_workers=arguments.workers
    )
    readers = {"bare": Reader(loader), "ours": Reader(our_loader(paths, arguments))}
    rates: dict[str, list[Rate]] = {name: [] for name in readers}
    for repeat in range(arguments.repeats + 1):
        for name in ("bare", "ours") if repeat % 2 else ("ours", "bare"):
            rate = readers[name].rate(arguments.samples)
            if repeat:  # the first warms up
                rates[name].append(rate)
    lines = ["| | samples/s | samples/s of CPU time |", "|---|---|---|"]
    medians = {
        name: Rate(*map(statistics.median, zip(*of_one, strict=True)))
        for name, of_one in rates.items()
    }
    for name, title in (("bare", "only decoding"), ("ours", "training loader")):
        lines.append(f"| {title} | {medians[name].by_clock:.2f} | {medians[name].by_cpu:.2f} |")
    shares = [a / b for a, b in zip(medians["ours"], medians["bare"], strict=True)]
    return "\n".join([*lines, f"| share | {shares[0]:.2f} | {shares[1]:.2f} |"])


def memory(paths: list[str], arguments: argparse.Namespace) -> str:
    reader = Reader(our_loader(paths, arguments))
    lines = ["samples  MiB of each reader's own memory"]
    for step in range(11):
        held = "  ".join(f"{mib:.1f}" for mib in reader.memory_mib())
        lines.append(f"{step * arguments.memory // 10:>7}  {held}")
        if step < 10:
            reader.rate(arguments.memory // 10)
    return "\n".join(lines)


def decoding(paths: list[str], arguments: argparse.Namespace) -> str:
    """Time and error of reduced decoding: the mean and largest difference of the resized pixels."""
    lines = ["| shrink to | scale | decode + resize, ms | mean error | 99.9% | largest |"]
    lines.append("|---|---|---|---|---|---|")
    samples = [s for p in paths for s in read_samples(p, lambda _: True)][: arguments.samples]
    for side in (1024, 512, 256):
        target: dict[int, list[np.ndarray]] = {}
        for shrink in (1, 2, 4, 8):
            seconds, results = [], []
            for sample in samples:
                size = decode_record(sample.key, sample.files).size
                if max(size) < shrink * side:
                    continue
                start = time.process_time()
                pixels, got = decode_reduced(sample.files["jpg"], size, shrink)
                resized_to = tuple(max(1, round(n * side / max(size))) for n in reversed(size))
                box = (0, 0, size[1] / got, size[0] / got)
                resized = pixels.resize(resized_to, Image.Resampling.BILINEAR, box)
                results.append(np.asarray(resized).astype(int))
                seconds.append(time.process_time() - start)
            if not results:
                continue
            target.setdefault(1, results)
            errors = np.concatenate(
                [np.abs(a - b).ravel() for a, b in zip(results, target[1], strict=True)]
            )
            lines.append(
                f"| {side} px | 1/{shrink} | {1000 * statistics.median(seconds):.1f} | "
                f"{errors.mean():.2f} | {np.quantile(errors, 0.999):.0f} | {errors.max()} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="*", help="shards; none: large images made on the spot")
    parser.add_argument("--workers", type=int, default=1, help="processes; one a free core")
    parser.add_argument("--img-size", type=int, default=1024, help="side of the model input")
    parser.add_argument("--batch-size", type=int, default=4, help="images; 8 in the small recipes")
    parser.add_argument("--max-masks", type=int, default=64, help="drawn per image")
    parser.add_argument("--samples", type=int, default=24, help="taken in one turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    parser.add_argument("--memory", type=int, help="only follow the readers' memory, over so many")
    parser.add_argument("--decoding", action="store_true", help="only measure reduced decoding")
    parser.add_argument("--out", type=Path, help="file that also gets the report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = ShardSource(path=arguments.path).shards() if arguments.path else []
        if not paths:
            made = Path(folder) / "large-000000.tar"
            make_large_shard(made, arguments.samples)
            paths = [str(made)]
        if arguments.memory:
            report = memory(paths, arguments)
        elif arguments.decoding:
            report = decoding(paths, arguments)
        else:
            report = compare(paths, arguments)
    what = ", ".join(arguments.path) or f"images of {LARGE_SIZE[0]} x {LARGE_SIZE[1]}, 100 masks"
    report = (
        f"{what}; input {arguments.img_size} px, at most {arguments.max_masks} masks drawn, "
        f"{arguments.workers} process(es)\n\n{report}"
    )
    print(report)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
