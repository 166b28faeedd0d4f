"""Finished shards: a tar, and beside it a manifest without which it does not count.

train-000000.tar             KEY.jpg and KEY.json, as SA-1B
train-000000.manifest.json   written after it: what is in it, what it was made from and with
manifest.json                all shards, once all are there; as sam-convert writes it, and checks it
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from sam_train.convert.manifest import MANIFEST
from sam_train.convert.tar_writer import TarWriter
from sam_train.ops.files import write_atomically

log = logging.getLogger(__name__)

KEPT = "Finished shards are kept: mend that and start again"


class LostShardError(Exception):
    """Another worker has taken over a shard that this one was writing."""


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """What is known of a finished shard.

    Attributes:
        name, bytes, sha256: of the shard.
        input: the same of the shard it was made from.
        images, masks: in it.
        images_without_masks, images_overfull: of these, see `filters.Limits`.
        rejects: candidates that were asked for, and how many each filter left out.
        damaged: {"name", "reason"} of images that could not be read and are not in it.
        made_with: what decides what is in it: model, round, settings.
        image_files: "untouched", or what they went through.
        code_version: of the project.
        wall_clock: what differs from run to run: {"seconds", "model_seconds", "mtime_ns" of the shard}.
    """

    name: str
    bytes: int
    sha256: str
    input: Mapping[str, Any]
    images: int
    masks: int
    images_without_masks: int
    images_overfull: int
    rejects: Mapping[str, int]
    damaged: Sequence[Mapping[str, str]]
    made_with: Mapping[str, Any]
    image_files: str
    code_version: str
    wall_clock: Mapping[str, Any]


def manifest_path(shard: Path) -> Path:
    """Where the manifest of a shard is."""
    return shard.with_suffix(".manifest.json")


def finished(shard: Path, *, in_full: bool = False) -> ShardManifest | None:
    """The manifest of a shard that is whole, None of one that is not there or not what was written.

    Args:
        shard: its path.
        in_full: read all of it; else only where its size is right and its time of change is not.
    """
    path = manifest_path(shard)
    try:
        manifest = ShardManifest(**json.loads(path.read_text(encoding="utf-8")))
        found = shard.stat()
        is_unchanged = found.st_mtime_ns == manifest.wall_clock["mtime_ns"]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        log.warning("%s is damaged: its shard does not count", path)
        return None
    if found.st_size != manifest.bytes:
        log.warning(
            "%s has %d bytes, its manifest says %d: it does not count",
            shard,
            found.st_size,
            manifest.bytes,
        )
        return None
    if (in_full or not is_unchanged) and _sum(shard) != manifest.sha256:
        log.warning("%s is damaged, its checksum is not its manifest's: it does not count", shard)
        return None
    return manifest


class WrittenShard(NamedTuple):
    """A tar that is in place: its size, checksum and time of change."""

    bytes: int
    sha256: str
    mtime_ns: int


class ShardWriter:
    """A shard that is being written; as a context it leaves nothing half-written where it is left early."""

    def __init__(self, shard: Path) -> None:
        self.shard = shard
        with _writing(shard):
            shard.parent.mkdir(parents=True, exist_ok=True)
            clear(shard, manifest_path(shard))
            self._tar: TarWriter | None = TarWriter(shard)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tar is not None:
            self._tar.abandon()

    def add(self, key: str, suffix: str, image: bytes, content: Mapping[str, Any]) -> None:
        """Adds an image file and the JSON of its masks."""
        assert self._tar is not None
        self._tar.add(key, {suffix: image, "json": msgspec.json.encode(content)})

    def finish(self) -> WrittenShard:
        """Puts the shard in place, on disk.

        Raises:
            LostShardError: another worker began it anew.
        """
        assert self._tar is not None
        try:
            with _writing(self.shard):
                num_bytes, sha256 = self._tar.finish()
                self._tar = None
                mtime_ns = self.shard.stat().st_mtime_ns
        except FileNotFoundError:
            if self.shard.parent.is_dir():
                raise LostShardError from None
            raise
        return WrittenShard(num_bytes, sha256, mtime_ns)


def write_manifest(shard: Path, manifest: ShardManifest) -> None:
    """Makes a shard count."""
    with _writing(manifest_path(shard)):
        write_atomically(manifest_path(shard), json.dumps(asdict(manifest), indent=1) + "\n")


def write_total(out: Path, split: str, manifests: Sequence[ShardManifest]) -> None:
    """Writes `manifest.json` of all shards of a folder, as sam-convert does."""
    names = ("name", "images", "masks", "bytes", "sha256")
    shards = [{name: getattr(own, name) for name in names} for own in manifests]
    total = {
        "splits": {
            split: {
                "images": sum(own.images for own in manifests),
                "masks": sum(own.masks for own in manifests),
                "shards": shards,
            }
        },
        "images_without_masks": sum(own.images_without_masks for own in manifests),
        "damaged": [damaged for own in manifests for damaged in own.damaged],
    }
    with _writing(out / MANIFEST):
        write_atomically(out / MANIFEST, json.dumps(total, indent=1) + "\n")


def clear(*paths: Path) -> None:
    """Removes what killed workers left of files; a live one whose claim ran out finds its own gone."""
    for path in paths:
        for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*"):
            unfinished.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says of a failure that what is finished stays."""
    try:
        yield
    except OSError as error:
        said = str(error.strerror or error)
        said = said if KEPT in said else f"{said}. {KEPT}"
        raise OSError(error.errno, said, str(path)) from None  # of the kind that the number says


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
