"""Embeddings on disk: what goes in comes out, and what is not whole or not the same is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sam_train.data import embedding_cache
from sam_train.data.embedding_cache import CacheError, EmbeddingCache, thumbnails

SHAPE = (3, 4, 4)
FILL = """
import sys, torch
from sam_train.data.embedding_cache import EmbeddingCache
cache = EmbeddingCache(sys.argv[1], encoder="e", shape=(64, 32, 32), dtype="float16")
with cache.writer() as writer:
    for i in range(int(sys.argv[3])):
        writer.add(f"{sys.argv[2]}{i}", torch.zeros(48).byte().numpy(), torch.full((64, 32, 32), i % 1000.0))
        print(i, flush=True)
"""


def image(number: int) -> Tensor:
    """(1, 3, 16, 16), another for each number."""
    return torch.full((1, 3, 16, 16), 10.0 * number)


def embedding(number: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))


def open_cache(folder: Path, dtype: str | None = "float16") -> EmbeddingCache:
    return EmbeddingCache(folder, encoder="e", shape=SHAPE, dtype=dtype)


def fill(folder: Path, numbers: range, dtype: str = "float16") -> None:
    with open_cache(folder, dtype).writer() as writer:
        for i in numbers:
            writer.add(f"image-{i}", thumbnails(image(i))[0], embedding(i))


@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_what_was_written_is_read_in_any_order(tmp_path: Path, dtype: str, rounding: float) -> None:
    fill(tmp_path, range(3), dtype)
    fill(tmp_path, range(3, 6), dtype)

    cache = open_cache(tmp_path, None)

    assert len(cache) == 6
    read = cache.read(["image-4", "image-0"], torch.cat([image(4), image(0)]))
    expected = torch.stack([embedding(4), embedding(0)])
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, expected, rtol=rounding, atol=1e-6)
    assert "image-5" in cache
    assert "image-6" not in cache
    on_disk = sum(path.stat().st_size for path in cache.folder.glob("*.[bi]*[nx]"))
    assert on_disk == 6 * cache.bytes_per_image


def test_a_writer_begins_a_new_part_where_one_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_cache, "MAX_PART_BYTES", 200)  # two embeddings of 96 bytes
    fill(tmp_path, range(5))

    cache = open_cache(tmp_path)

    assert len(list(cache.folder.glob("*.bin"))) == 3
    for i in range(5):
        torch.testing.assert_close(
            cache.read([f"image-{i}"], image(i))[0], embedding(i), rtol=1e-3, atol=1e-6
        )


def test_of_processes_killed_while_they_write_together_every_whole_embedding_stays(
    tmp_path: Path,
) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, str(tmp_path), name, "1000000"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    told = {}
    for name, writer in zip("ab", writers, strict=True):
        assert writer.stdout is not None
        told[name] = [int(writer.stdout.readline()) for _ in range(20)][-1]
    time.sleep(0.05)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()

    cache = EmbeddingCache(tmp_path, encoder="e", shape=(64, 32, 32))

    for name, last in told.items():
        assert all(f"{name}{i}" in cache for i in range(last + 1))
    for name in "ab":
        for i in range(len(cache)):
            if f"{name}{i}" in cache:
                read = cache.read([f"{name}{i}"], torch.zeros(1, 3, 8, 8))
                assert (read == i % 1000).all()


def test_half_a_row_and_half_an_embedding_count_as_missing(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    folder = open_cache(tmp_path).folder
    with next(folder.glob("*.bin")).open("ab") as file:
        file.write(b"1" * 50)
    with next(folder.glob("*.idx")).open("ab") as file:
        file.write(b"1" * 63)

    cache = open_cache(tmp_path)

    assert len(cache) == 2
    cache.read(["image-1"], image(1))


def test_damage_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, range(3))
    folder = open_cache(tmp_path).folder
    flip(next(folder.glob("*.bin")), 100)  # in the second embedding
    flip(next(folder.glob("*.idx")), 2 * 64 + 20)  # in the third row

    cache = open_cache(tmp_path)

    assert "1 damaged rows" in caplog.text
    assert "image-2" not in cache
    cache.read(["image-0"], image(0))
    with pytest.raises(CacheError, match=r"image-1 is damaged; remove this file"):
        cache.read(["image-1"], image(1))


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 255
    path.write_bytes(content)


def test_another_image_under_the_same_name_and_a_flipped_one_are_refused(tmp_path: Path) -> None:
    slope = torch.arange(16.0).expand(1, 3, 16, 16) * 8
    with open_cache(tmp_path).writer() as writer:
        writer.add("slope", thumbnails(slope)[0], embedding(0))
    cache = open_cache(tmp_path)

    cache.read(["slope"], slope + 1)  # another decoder
    for other in (slope.flip(-1), slope + 20):
        with pytest.raises(CacheError, match="of another image or another view"):
            cache.read(["slope"], other)


def test_a_missing_embedding_and_a_missing_cache_say_how_to_make_them(tmp_path: Path) -> None:
    fill(tmp_path, range(1))

    with pytest.raises(CacheError, match="no embedding of image image-7: sam-precompute"):
        open_cache(tmp_path).read(["image-7"], image(7))
    with pytest.raises(CacheError, match=r"no embeddings of this encoder \(f\): sam-precompute"):
        EmbeddingCache(tmp_path, encoder="f", shape=SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "choose another run_dir"),
        ({"shape": (3, 8, 8)}, "choose another run_dir"),
        ({"dtype": "float32"}, "dtype is one of float16, bfloat16"),
    ],
)
def test_a_cache_of_another_kind_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    fill(tmp_path, range(1))

    settings: dict[str, object] = {"encoder": "e", "shape": SHAPE, "dtype": "float16", **change}
    with pytest.raises(CacheError, match=message):
        EmbeddingCache(tmp_path, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [1e5, float("nan")])
def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path, number: float) -> None:
    thumbnail = np.zeros(48, np.uint8)
    with open_cache(tmp_path).writer() as writer, pytest.raises(CacheError, match="bfloat16"):
        writer.add("large", thumbnail, torch.full(SHAPE, number))
    if number == 1e5:
        cache = open_cache(tmp_path / "other", "bfloat16")
        with cache.writer() as writer:
            writer.add("large", thumbnail, torch.full(SHAPE, number))
