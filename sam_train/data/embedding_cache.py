"""Image embeddings on disk, keyed by image and encoder.

A cache is a folder with one subfolder for each encoder:

    ENCODER/cache.json    what every embedding in it is: shape and number format
    ENCODER/PART.bin      embeddings, one after the other, all of one size
    ENCODER/PART.idx      a row of 64 bytes for each: name, checksum, thumbnail

A part is written by one process alone and never by a later one, so several may fill a cache. The row
follows the embedding: whatever a killed process leaves half written has no whole row and counts as
missing. Checksums find what a crash of the machine or a bad disk damages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.ops.files import write_atomically

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
THUMBNAIL_SIDE = 4
THUMBNAIL_TOLERANCE = 2
"""Levels of 255 by which decoders and resizing may differ from one machine to another."""
MAX_PART_BYTES = 1 << 30
ROW = np.dtype(
    [
        ("name", "<u8"),
        ("embedding_crc", "<u4"),
        ("thumbnail", "u1", 3 * THUMBNAIL_SIDE**2),
        ("row_crc", "<u4"),
    ]
)


class CacheError(ValueError):
    """A cache that is not there, holds something else, or is damaged; the message says what to do."""


class EmbeddingCache:
    """The embeddings of one encoder, found by the image's key.

    The index, 84 bytes an image, is read when the cache is opened; what others add later is not seen.

    Attributes:
        folder: of this encoder.
        shape: (C, h, w) of every embedding.
        dtype: `float16` or `bfloat16`.
    """

    def __init__(
        self, folder: str | Path, *, encoder: str, shape: tuple[int, ...], dtype: str | None = None
    ) -> None:
        """Opens a cache, or begins one.

        Args:
            folder: of the cache.
            encoder: identity of the encoder, `encoder_id`.
            shape: (C, h, w) of its embeddings.
            dtype: of what is kept; None opens a cache that is there, whatever it keeps.

        Raises:
            CacheError: there is no such cache, or it is of another kind.
        """
        self.folder = Path(folder) / encoder
        self.shape = tuple(shape)
        if dtype is not None and dtype not in DTYPES:
            raise CacheError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
        description = self.folder / "cache.json"
        if dtype is not None and not description.is_file():
            begun = {"format": FORMAT_VERSION, "shape": list(self.shape), "dtype": dtype}
            write_atomically(description, json.dumps(begun) + "\n")
        if not description.is_file():
            raise CacheError(
                f"{folder} holds no embeddings of this encoder ({encoder}): sam-precompute "
                f"checkpoint=PATH data=NAME run_dir={folder} makes them, with the same weights and "
                "img_size"
            )
        self.dtype = self._check(description, dtype)
        self._load_index()

    def _check(self, path: Path, dtype: str | None) -> str:
        """The number format of the cache, which is what it is expected to be."""
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kept = found["dtype"], tuple(found["shape"]), found["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged ({error}): remove {path.parent}") from error
        expected = dtype or kept[0], self.shape, FORMAT_VERSION
        if kept != expected:
            raise CacheError(
                f"{path.parent} keeps embeddings of dtype, shape and format {kept}, expected {expected}: "
                "choose another run_dir, or the dtype it has"
            )
        return kept[0]

    def _load_index(self) -> None:
        rows, parts, places = [], [], []
        self._part_files = sorted(self.folder.glob("*.idx"))
        for number, path in enumerate(self._part_files):
            raw = path.read_bytes()
            found = np.frombuffer(raw[: len(raw) // ROW.itemsize * ROW.itemsize], ROW)
            is_whole = np.array([_row_crc(row) == row["row_crc"] for row in found], bool)
            if not is_whole.all():
                log.warning("%s: %d damaged rows are left out", path, (~is_whole).sum())
            rows.append(found[is_whole])
            places.append(np.flatnonzero(is_whole))
            parts.append(np.full(int(is_whole.sum()), number))
        self._rows = np.concatenate([np.zeros(0, ROW), *rows])
        order = np.argsort(self._rows["name"], kind="stable")
        self._rows = self._rows[order]
        self._names = np.ascontiguousarray(self._rows["name"])
        self._parts = np.concatenate([np.zeros(0, np.int64), *parts])[order].astype(np.uint32)
        self._places = np.concatenate([np.zeros(0, np.int64), *places])[order]

    @property
    def bytes_per_image(self) -> int:
        """What an embedding takes on disk, its row in the index included."""
        return self._embedding_bytes + ROW.itemsize

    @property
    def _embedding_bytes(self) -> int:
        return int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize

    def __len__(self) -> int:
        return len(np.unique(self._names))

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def _find(self, key: str) -> int | None:
        name = _name(key)
        row = int(np.searchsorted(self._names, name))
        is_there = row < len(self._names) and self._names[row] == name
        return row if is_there else None

    def read(self, keys: Sequence[str], images: Tensor) -> Tensor:
        """The embeddings of a batch.

        Args:
            keys: of N images.
            images: (N, 3, S, S) the padded model inputs, 0 to 255; compared with what was encoded, since
                a key may be that of another set's image, and an augmented image has another embedding.

        Returns:
            (N, C, h, w) float32 on the images' device.

        Raises:
            CacheError: one is missing, damaged or of another image.
        """
        embeddings = [
            self._read(key, thumbnail)
            for key, thumbnail in zip(keys, thumbnails(images), strict=True)
        ]
        return torch.stack(embeddings).to(images.device, torch.float32)

    def _read(self, key: str, thumbnail: np.ndarray) -> Tensor:
        row = self._find(key)
        if row is None:
            raise CacheError(
                f"{self.folder} has no embedding of image {key}: sam-precompute with this data adds "
                "those that are missing"
            )
        distance = np.abs(self._rows["thumbnail"][row].astype(int) - thumbnail).max()
        if distance > THUMBNAIL_TOLERANCE:
            raise CacheError(
                f"{self.folder}: the embedding of {key} is of another image or another view of it. "
                "A cache is for whole images without crop, flips or colour changes, of one data set"
            )
        path = self._part_files[self._parts[row]].with_suffix(".bin")
        with path.open("rb") as file:
            raw = os.pread(
                file.fileno(), self._embedding_bytes, int(self._places[row]) * self._embedding_bytes
            )
        if zlib.crc32(raw) != self._rows["embedding_crc"][row]:
            raise CacheError(
                f"{path}: the embedding of {key} is damaged; remove this file and its .idx, and run "
                "sam-precompute again"
            )
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[self.dtype]).view(self.shape)

    def writer(self) -> EmbeddingWriter:
        """Adds embeddings, in parts of its own."""
        return EmbeddingWriter(self)


class EmbeddingWriter:
    """Adds embeddings to a cache; a context manager."""

    def __init__(self, cache: EmbeddingCache) -> None:
        self._cache = cache
        self._files: tuple[BinaryIO, BinaryIO] | None = None

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def add(self, key: str, thumbnail: np.ndarray, embedding: Tensor) -> None:
        """Writes one embedding.

        Args:
            key: of the image.
            thumbnail: of its model input, from `thumbnails`.
            embedding: (C, h, w).

        Raises:
            CacheError: a number is too large for the cache's number format.
        """
        cache = self._cache
        if tuple(embedding.shape) != cache.shape:
            raise CacheError(f"expected an embedding {cache.shape}, got {tuple(embedding.shape)}")
        kept = embedding.detach().cpu().to(DTYPES[cache.dtype]).contiguous()
        if not torch.isfinite(kept).all():
            raise CacheError(
                f"the embedding of {key} has numbers that {cache.dtype} cannot hold: dtype=bfloat16 in "
                "another run_dir takes larger ones, if the encoder did not answer with NaN"
            )
        raw = kept.view(torch.uint8).numpy().tobytes()
        row = np.zeros((), ROW)
        row["name"], row["embedding_crc"], row["thumbnail"] = _name(key), zlib.crc32(raw), thumbnail
        row["row_crc"] = _row_crc(row)
        embeddings, index = self._open_files(len(raw))
        embeddings.write(raw)
        embeddings.flush()
        # Only now: a row says that its embedding is all there.
        index.write(row.tobytes())
        index.flush()

    def _open_files(self, num_bytes: int) -> tuple[BinaryIO, BinaryIO]:
        if self._files is not None and self._files[0].tell() + num_bytes > MAX_PART_BYTES:
            self._close()
        if self._files is None:
            part = self._cache.folder / uuid.uuid4().hex
            self._files = part.with_suffix(".bin").open("xb"), part.with_suffix(".idx").open("xb")
        return self._files

    def _close(self) -> None:
        for file in self._files or ():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._files = None


def thumbnails(images: Tensor) -> np.ndarray:
    """(N, 3, S, S) images of 0 to 255 as (N, 48) bytes: what tells one image from another."""
    means = F.adaptive_avg_pool2d(images.float(), THUMBNAIL_SIDE)
    return means.flatten(1).round().to(torch.uint8).cpu().numpy()


def _name(key: str) -> np.uint64:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _row_crc(row: np.ndarray | np.void) -> int:
    return zlib.crc32(row.tobytes()[: -ROW["row_crc"].itemsize])
