"""Small SA-1B shards made on the spot, and the real ones where they are at hand."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from sam_train.data.shards import encode_record
from sam_train.ops import rle
from sam_train.structures import Annotation, ImageRecord

WriteShard = Callable[[Path, Mapping[str, bytes]], Path]


def make_record(key: str, masks: np.ndarray, image: np.ndarray | None = None) -> ImageRecord:
    """A record of masks (M, H, W); by default the image is white where the first mask is."""
    if image is None:
        image = np.repeat(np.where(masks[0], 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    annotations = []
    for index, mask in enumerate(masks):
        run_lengths = rle.encode(mask)
        annotations.append(
            Annotation(id=index, rle=run_lengths, bbox=rle.bbox(run_lengths), area=int(mask.sum()))
        )
    return ImageRecord(key, image.shape[:2], tuple(annotations), lambda: image, "made")


def square_record(key: str, size: tuple[int, int] = (24, 32)) -> ImageRecord:
    """A record with one 8 x 8 square whose place depends on the key."""
    mask = np.zeros((1, *size), bool)
    offset = sum(key.encode()) % (min(size) - 8)
    mask[0, offset : offset + 8, offset : offset + 8] = True
    return make_record(key, mask)


def files_of(record: ImageRecord) -> dict[str, bytes]:
    """The files of a sample by file name, the image as PNG."""
    encoded = encode_record(record, suffix="png")
    return {f"{record.key}.{suffix}": data for suffix, data in encoded.items()}


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def make():
    """The functions above, for tests that cannot import them."""
    return _Make


class _Make:
    record = staticmethod(make_record)
    square = staticmethod(square_record)
    files = staticmethod(files_of)
    tar = staticmethod(write_tar)

    @staticmethod
    def shards(folder: Path, counts: list[int]) -> list[str]:
        """Writes a shard of each count of samples, with keys that tell shard and number."""
        for shard, count in enumerate(counts):
            files: dict[str, bytes] = {}
            for index in range(count):
                files |= files_of(square_record(f"s{shard}_{index}"))
            write_tar(folder / f"part-{shard:06d}.tar", files)
        return [f"s{shard}_{index}" for shard, count in enumerate(counts) for index in range(count)]


@pytest.fixture
def real_set():
    """The folder of a real data set by name; skips the test, saying so, where there is none."""
    root = Path(os.environ.get("SAM_TRAIN_DATA", Path(__file__).parents[4] / "shared" / "data"))

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"REAL DATA MISSING: {root / name} (set SAM_TRAIN_DATA to have it tested)")
        return root / name

    return folder
