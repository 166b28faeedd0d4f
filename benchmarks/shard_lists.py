"""What 11 million images in 1,000 tars cost to list, to start on, to hold a place in and to go on from.

    OMP_NUM_THREADS=1 python benchmarks/shard_lists.py

One sparse tar of SA-1B's size (11,186 samples, 11 GB; the images are holes in the file, 90 MB on disk) is
there under 1,000 names. No image is decoded, and holes are read at the speed of memory: a real disk takes
longer by the bytes that the table names.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam_train.data.sa1b import ShardSource, WindowStart
from sam_train.ops import rle

SAMPLES, IMAGE_BYTES = 11_186, 960 * 1024
"""Of one of SA-1B's tars, about."""


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="in a shard")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report(Path(name), given.shards, given.samples)


def report(folder: Path, num_shards: int, num_samples: int) -> None:
    """Measures each step and prints it."""
    tar = folder / "whole.bin"
    sample_bytes = write_sparse_tar(tar, num_samples)
    many = sample_bytes * num_samples // 2**30 + 1  # shards of about 1 GB instead
    for part, count in (("a", num_shards), ("b", num_shards * many)):
        (folder / part).mkdir()
        for number in range(count):
            (folder / part / f"sa_{number:06d}.tar").symlink_to(tar)
    source = ShardSource(path=str(folder / "a"), max_bad_fraction=0)
    finer = ShardSource(path=str(folder / "b"))
    print(f"{num_shards} shards of {num_samples} samples, {tar.stat().st_size / 1e9:.1f} GB each\n")
    print("| | s | s of CPU | MB read |\n|---|---|---|---|")
    row(f"list {num_shards} shards", source.shards)
    row(f"list {num_shards * many} shards", finer.shards)
    whole = num_shards // 4  # readers of four shards each
    row(f"first record, reader 0 of {whole}", lambda: first(source, 0, whole))
    for share in (0.1, 0.9):
        sample = int(share * num_samples)
        window = WindowStart(2, sample * sample_bytes, 2 * num_samples + sample)
        cursor = (tuple(window), 30, window.samples + 30, 0)
        row(
            f"go on in the third shard of four, at {100 * share:.0f} % of it",
            lambda cursor=cursor: first(source, 0, whole, cursor),  # type: ignore[misc]
        )
    uneven = num_shards + 24
    row(f"first record, last of {uneven} readers", lambda: first(source, uneven - 1, uneven))
    print(
        f"\nposition: {position_bytes(uneven, sample_bytes)} bytes of a checkpoint for {uneven} readers"
    )
    print(f"memory: {grown(source, whole) / 2**20:.0f} MiB more at the peak of 300 records")


def write_sparse_tar(path: Path, num_samples: int) -> int:
    """Writes the tar, and returns how many bytes a sample takes in it."""
    mask = np.zeros((1500, 2250), bool)
    mask[300:700, 400:900] = True
    runs = rle.encode(mask)
    annotation = {"id": 1, "segmentation": runs, "bbox": [400, 300, 500, 400], "area": 200000}
    image = {"image_id": 1, "width": 2250, "height": 1500, "file_name": "a.jpg"}
    text = json.dumps({"image": image, "annotations": [annotation]}).encode()
    with path.open("wb") as file:
        for number in range(num_samples):
            for suffix, size in (("jpg", IMAGE_BYTES), ("json", len(text))):
                header = tarfile.TarInfo(f"sa_{number:08d}.{suffix}")
                header.size = size
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
                if suffix == "json":
                    file.write(text)
                file.seek(
                    -(-size // 512) * 512 - (len(text) if suffix == "json" else 0), io.SEEK_CUR
                )
        end = file.tell()
        file.truncate(end + 1024)
    return end // num_samples


def row(what: str, step: Callable[[], object]) -> None:
    """Times a step, counts the bytes that it read, and prints both."""
    before, began, cpu_began = bytes_read(), time.perf_counter(), time.process_time()
    step()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    read = (bytes_read() - before) / 1e6
    print(f"| {what} | {seconds:.2f} | {cpu:.2f} | {read:.1f} |", flush=True)


def first(source: ShardSource, reader: int, num_readers: int, start: Any = ()) -> object:
    """A reader's first record."""
    return next(
        source.records(epoch=0, reader=reader, num_readers=num_readers, shuffle=True, start=start)
    )


def position_bytes(num_readers: int, sample_bytes: int) -> int:
    """What the positions of all readers add to a checkpoint, on a month's last day."""
    readers = [
        (7, ((3, (5_000 + number) * sample_bytes, 38_000 + number), 60, 38_060 + number, 3))
        for number in range(num_readers)
    ]
    empty, full = io.BytesIO(), io.BytesIO()
    torch.save({"data": {}}, empty)
    torch.save({"data": {"num_batches": 10**6, "readers": readers}}, full)
    return full.tell() - empty.tell()


def grown(source: ShardSource, num_readers: int) -> int:
    """By how many bytes the process grows while one of the readers gives out records."""
    records = source.records(epoch=1, reader=1, num_readers=num_readers, shuffle=True)
    before = resident_bytes()
    for _, _ in zip(range(300), records, strict=False):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def bytes_read() -> int:
    """By this process so far, from files of any kind."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def resident_bytes() -> int:
    """What this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
