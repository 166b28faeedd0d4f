"""Takes an image down, as a person asked: its rows, and its place in every shard that the engine wrote."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from data_engine.engine import Engine
from data_engine.mask_store.lineage import cleaned, take_down, tombstones
from data_engine.measure import HELD_OUT
from data_engine.records import Tombstone
from data_engine.round_parts import IMAGES
from data_engine.shard_writer import (
    ShardManifest,
    ShardWriter,
    finished,
    manifest_path,
    write_manifest,
)
from data_engine.shards_of_round import sum_up_folder
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import IMAGE_SUFFIXES
from sam_train.data.tar_samples import read_samples

log = logging.getLogger(__name__)


class Removed(NamedTuple):
    """What was taken down.

    Attributes:
        tombstone: as it now stands; `models` have learnt from the image, and only training anew helps.
        num_shards: files that the image was taken out of.
    """

    tombstone: Tombstone
    num_shards: int

    def __str__(self) -> str:
        lines = [f"{self.tombstone.key} is taken down, and out of {self.num_shards} shards."]
        if self.tombstone.models:
            lines.append(f"These models have learnt from it: {', '.join(self.tombstone.models)}.")
        lines.append(
            "Its own file is untouched; pictures in reports and eval/ folders may show it."
        )
        return "\n".join(lines)


def remove(engine: Engine, name: str, *, reason: str, who: str) -> Removed:
    """Takes an image down; called again after a crash, it goes on.

    Args:
        engine: see there.
        name: the image's key or hash.
        reason, who: for the record.

    Raises:
        ValueError: there is no such image.
    """
    image_id = _image_id(engine, name)
    stone = take_down(engine.store, image_id, reason=reason, who=who, now=engine.clock())
    num_shards = 0
    for stored in stone.shards:
        _clean_shard(engine, stored, stone.key)
        stone = cleaned(engine.store, image_id, [stored])
        num_shards += 1
    for path in _unlisted(engine):
        num_shards += take_out(path, stone.key) is not None
    for encoded in engine.root.glob(f"rounds/*/embeddings/*/{image_id}.safetensors"):
        encoded.unlink()
    return Removed(stone, num_shards)


def take_out(path: Path, key: str) -> ShardManifest | None:
    """Writes a shard again without an image, and its manifest; a shard that is left empty is removed.

    Returns:
        The new manifest; None where the image was not in it.
    """
    manifest = finished(path)
    kept = [sample for sample in read_samples(str(path), is_wanted) if sample.key != key]
    if manifest is None or len(kept) == manifest.images:
        return None
    num_masks = num_empty = 0
    with ShardWriter(path) as writer:
        for sample in kept:
            suffix = next(one for one in IMAGE_SUFFIXES if one in sample.files)
            content = msgspec.json.decode(sample.files["json"])
            writer.add(sample.key, suffix, sample.files[suffix], content)
            num_masks += len(content["annotations"])
            num_empty += not content["annotations"]
        written = writer.finish()
    manifest = replace(
        manifest,
        bytes=written.bytes,
        sha256=written.sha256,
        images=len(kept),
        masks=num_masks,
        images_without_masks=num_empty,
        wall_clock={**manifest.wall_clock, "mtime_ns": written.mtime_ns},
    )
    write_manifest(path, manifest)
    if not kept:
        path.unlink()
        manifest_path(path).unlink()
    sum_up_folder(path.parent)
    return manifest


def _clean_shard(engine: Engine, stored: str, key: str) -> None:
    path = engine.path(stored)
    shard = next((one for one in engine.store.shards() if one.path == stored), None)
    if shard is None or not path.is_file():
        return
    if (manifest := take_out(path, key)) is None:
        return
    known = engine.store.images_by_key(
        [sample.key for sample in read_samples(str(path), is_wanted)] if manifest.images else []
    )
    engine.store.put_shard(
        replace(
            shard,
            num_images=manifest.images,
            num_masks=manifest.masks,
            sha256=manifest.sha256,
        ),
        [image.id for image in known.values()],
    )


def _unlisted(engine: Engine) -> Iterator[Path]:
    """Shards of the engine that are no work of a round's: held-out images, inputs of an automatic stage."""
    yield from sorted((engine.root / HELD_OUT).glob("*.tar"))
    yield from sorted((engine.root / "rounds").glob(f"*/{IMAGES}/*.tar"))


def _image_id(engine: Engine, name: str) -> str:
    stones = {stone.key: stone.image_id for stone in tombstones(engine.store)}
    known = engine.store.images_by_key([name])
    if name in known:
        return known[name].id
    if name in stones or name in stones.values():
        return stones.get(name, name)
    if name in engine.store.images_by_id([name]):
        return name
    raise ValueError(f"image={name}: no image of this key or hash is registered in {engine.root}")
