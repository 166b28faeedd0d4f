"""Takes an image down, as a person asked: its rows, its place in every shard of the engine, pictures of it."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from data_engine.engine import Engine, only_one
from data_engine.image_copies import copies_of
from data_engine.image_traces import (
    embeddings,
    holds,
    identified,
    pictures_of_measuring,
    pictures_of_rounds,
    pictures_of_training,
    shard_files,
)
from data_engine.mask_store.lineage import cleaned, everything_from, take_down
from data_engine.measure import HELD_OUT
from data_engine.records import Tombstone
from data_engine.report import write_report
from data_engine.round_parts import IMAGES
from data_engine.shard_plan import leave_out
from data_engine.shard_writer import (
    ShardManifest,
    ShardWriter,
    finished,
    manifest_path,
    write_manifest,
)
from data_engine.shards_of_round import SHARDS, sum_up_folder
from sam_train import config
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import IMAGE_SUFFIXES
from sam_train.data.tar_samples import read_samples
from sam_train.training import run_lock

log = logging.getLogger(__name__)


class Removed(NamedTuple):
    """What was taken down.

    Attributes:
        tombstone: as it now stands: `shards` are not at hand and hold it still; `models` have learnt from it.
        num_shards: files that the image was taken out of.
        num_pictures: files that were removed, as they may have shown it.
    """

    tombstone: Tombstone
    num_shards: int
    num_pictures: int

    def __str__(self) -> str:
        stone = self.tombstone
        lines = [
            f"{stone.key} is taken down, and out of {self.num_shards} shards; "
            f"{self.num_pictures} pictures that may have shown it are removed."
        ]
        if stone.shards:
            lines.append(
                f"These shards are gone or damaged and may hold it: {', '.join(stone.shards)}. Where you find "
                "them again, put them back and call this again."
            )
        if stone.models:
            lines.append(
                f"These models have learnt from it, and only training anew without it helps: "
                f"{', '.join(stone.models)}."
            )
        lines.append(
            "The file that it was registered from is untouched, and so are backups made before."
        )
        return "\n".join(lines)


def remove(engine: Engine, name: str, *, reason: str, who: str) -> Removed:
    """Takes an image down; called again after a crash, it goes on.

    Args:
        engine: see there.
        name: the image's key or hash.
        reason, who: for the record.

    Raises:
        ValueError: there is no such image, or a round or a training is under way at this moment.
    """
    image_id, key = identified(engine, name)
    with only_one(engine.root):
        num_pictures = _remove_pictures(engine, image_id, key)
        stone = take_down(engine.store, image_id, reason=reason, who=who, now=engine.clock())
        _give_up_trainings(engine, stone)
        num_shards = 0
        for stored in stone.shards:
            if is_clean := _clean_shard(engine, stored, key):
                stone = cleaned(engine.store, image_id, [stored])
            num_shards += is_clean
        listed = {engine.path(shard.path) for shard in engine.store.shards()}
        for path in shard_files(engine):
            num_shards += path not in listed and _clean_other(path, key)
        for path in (*embeddings(engine, image_id), *copies_of(engine.root, image_id)):
            path.unlink(missing_ok=True)
        _write_reports(engine)
    return Removed(stone, num_shards, num_pictures)


def _remove_pictures(engine: Engine, image_id: str, key: str) -> int:
    """Before anything else is: what is left after a crash then tells what there may have been."""
    rounds = everything_from(engine.store, image_id).rounds
    found = [*pictures_of_rounds(engine, rounds), *pictures_of_training(engine)]
    if any(path.parent.name == HELD_OUT and holds(path, key) for path in shard_files(engine)):
        found += pictures_of_measuring(engine)
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def _write_reports(engine: Engine) -> None:
    """Those whose pages are gone."""
    settings = config.instantiate(engine.settings["report"])
    for round_ in engine.store.rounds():
        folder = engine.round_folder(round_.number)
        if (folder / "report.json").is_file() and not (folder / "report.html").is_file():
            write_report(engine.store, engine.root, round_.number, settings)


def _give_up_trainings(engine: Engine, stone: Tombstone) -> None:
    """Unfinished ones begin anew, without the image."""
    if not stone.shards:
        return
    known = {model.path for model in engine.store.models()}
    for folder in sorted(engine.root.glob("rounds/*/training_*")):
        name = folder.name.removeprefix("training_")
        if engine.relative(folder.parent / "checkpoints" / f"{name}.ckpt") not in known:
            with run_lock.held(folder):
                shutil.rmtree(folder)
            log.info("%s begins anew: it had the image", folder)


def take_out(path: Path, key: str) -> ShardManifest | None:
    """Writes a shard again without an image, and its manifest; a shard that is left empty is removed.

    Returns:
        The new manifest; None where the image was not in it, or the shard is damaged.
    """
    manifest = finished(path)
    if manifest is None or not holds(path, key):
        return None
    kept = [sample for sample in read_samples(str(path), is_wanted) if sample.key != key]
    if not kept:
        return _emptied(path, manifest)
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
    sum_up_folder(path.parent)
    return manifest


def _emptied(path: Path, manifest: ShardManifest) -> ShardManifest:
    if path.parent.name == IMAGES:
        leave_out(path.parent.parent / SHARDS, path.name)
    path.unlink()
    manifest_path(path).unlink()
    sum_up_folder(path.parent)
    return replace(manifest, images=0, masks=0, images_without_masks=0)


def _clean_shard(engine: Engine, stored: str, key: str) -> bool:
    """Takes an image out of a shard that the store knows; False where the shard is not at hand."""
    path = engine.path(stored)
    shard = next((one for one in engine.store.shards() if one.path == stored), None)
    if shard is None:
        return True
    if finished(path) is None:
        if shard.source == "automatic":
            return False
        # Comes again from the store, without the image; one that was put aside does not count any more.
        path.unlink(missing_ok=True)
        manifest_path(path).unlink(missing_ok=True)
        return True
    keys = [sample.key for sample in read_samples(str(path), is_wanted) if sample.key != key]
    if not keys:  # first, as nobody is to miss the file
        engine.store.put_shard(replace(shard, num_images=0, num_masks=0), [])
    if (manifest := take_out(path, key)) is not None and keys:
        images, masks, sha256 = manifest.images, manifest.masks, manifest.sha256
        engine.store.put_shard(
            replace(shard, num_images=images, num_masks=masks, sha256=sha256),
            [image.id for image in engine.store.images_by_key(keys).values()],
        )
    return True


def _clean_other(path: Path, key: str) -> bool:
    """The same of one that is no finished work of a round: held-out images, a stage's inputs and begun outputs."""
    if not holds(path, key):
        return False
    if take_out(path, key) is None:  # half-written: it would be made anew anyway
        path.unlink()
        manifest_path(path).unlink(missing_ok=True)
    return True
