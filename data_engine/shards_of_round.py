"""What people made in a round as SA-1B shards: the same masks, the same bytes.

Automatic masks are written as shards where they are made (`stages/fully_automatic.py`); `note_shards` tells
the store of either kind.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data_engine.code_version import code_version
from data_engine.engine import Engine
from data_engine.images import image_bytes
from data_engine.mask_store.rows import chunks
from data_engine.records import Image, Mask, MaskSource, Round, Shard
from data_engine.shard_writer import (
    ShardManifest,
    ShardWriter,
    clear,
    finished,
    manifest_path,
    write_manifest,
    write_total,
)
from data_engine.stages.shard_worker import MASKS_PER_SHARD
from sam_train.convert.manifest import MANIFEST
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import decode_image, encode_record, json_content
from sam_train.data.tar_samples import read_samples
from sam_train.structures import Annotation, ImageRecord

SHARDS = "shards"
MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"))


class Labelled(NamedTuple):
    """An image and its masks; their ids are given when they are written."""

    image: Image
    annotations: Sequence[Annotation]


def write_round(engine: Engine, round_: Round) -> list[ShardManifest]:
    """Writes the masks of a round of people to its folder, and tells the store.

    Images that are done and have no mask stay, with an empty list. Writing again gives the same bytes.

    Raises:
        ImageGoneError: an image is not where it was; no shard of the round counts then.
        OSError: the folder cannot be written.
    """
    source: MaskSource = "assisted" if round_.stage == "assisted" else "semi_automatic"
    manifests = write_shards(
        engine.round_folder(round_.number) / SHARDS,
        source,
        _labelled(engine, round_),
        images_per_shard=int(engine.settings["images_per_shard"]),
        made_with={"model": round_.model_id, "round": round_.number, "stage": source},
    )
    note_shards(engine, round_, manifests, source)
    kept = {manifest.name for manifest in manifests}
    for shard in engine.store.shards(round=round_.number, source=source):
        if shard.path.rpartition("/")[2] not in kept:  # an image was taken down since
            engine.store.put_shard(replace(shard, num_images=0, num_masks=0), [])
    return manifests


def write_shards(
    folder: Path,
    name: str,
    images: Iterable[Labelled],
    *,
    images_per_shard: int,
    made_with: dict[str, Any],
) -> list[ShardManifest]:
    """Writes images and masks as `NAME-000000.tar` and so on, and the manifests beside them.

    Shards of the name that were there and are not written again are removed.
    """
    manifests = [
        _write_shard(folder / f"{name}-{number:06d}.tar", number, chunk, made_with)
        for number, chunk in enumerate(chunks(images, images_per_shard))
    ]
    kept = {manifest.name for manifest in manifests}
    for path in folder.glob(f"{name}-*.tar"):
        if path.name not in kept:
            manifest_path(path).unlink(missing_ok=True)
            path.unlink()
    sum_up_folder(folder)
    return manifests


def sum_up_folder(folder: Path) -> None:
    """Writes the `manifest.json` of all finished shards of a folder, or removes it where there is none."""
    clear(folder / MANIFEST)
    found = (finished(path) for path in sorted(folder.glob("*.tar")))
    if manifests := [one for one in found if one is not None]:
        write_total(folder, manifests[0].name.rpartition("-")[0], manifests)
    else:
        (folder / MANIFEST).unlink(missing_ok=True)


def note_shards(
    engine: Engine, round_: Round, manifests: Sequence[ShardManifest], source: MaskSource
) -> None:
    """Tells the store what the shards of a round hold."""
    for manifest in manifests:
        path = engine.round_folder(round_.number) / SHARDS / manifest.name
        keys = [sample.key for sample in read_samples(str(path), is_wanted)]
        shard = Shard(
            path=engine.relative(path),
            round=round_.number,
            source=source,
            num_images=manifest.images,
            num_masks=manifest.masks,
            sha256=manifest.sha256,
            model_id=round_.model_id if source == "automatic" else None,
            created_at=engine.clock(),
        )
        known = engine.store.images_by_key(keys)
        engine.store.put_shard(shard, [image.id for image in known.values()])


def whole_shards(engine: Engine) -> list[Shard]:
    """All shards that the store knows of; what people made is written again where its file is gone.

    Raises:
        FileNotFoundError: one of automatic masks, which are nowhere else, is gone or damaged.
    """
    shards = [shard for shard in engine.store.shards() if shard.num_images]
    lost = [shard for shard in shards if finished(engine.path(shard.path)) is None]
    for number in sorted({shard.round for shard in lost if shard.source != "automatic"}):
        round_ = engine.store.round(number)
        assert round_ is not None
        write_round(engine, round_)
    if gone := [shard.path for shard in lost if shard.source == "automatic"]:
        raise FileNotFoundError(
            f"{engine.path(gone[0])} is gone or damaged"
            + (f" (and {len(gone) - 1} more)" if len(gone) > 1 else "")
            + ", and its automatic masks are nowhere else: put it back and call again"
        )
    return [shard for shard in engine.store.shards() if shard.num_images]


def _labelled(engine: Engine, round_: Round) -> Iterator[Labelled]:
    done = engine.store.tasks(round=round_.number, stage=round_.stage, state="done")
    images = engine.store.images_by_id([task.image_id for task in done])
    for image_id in sorted(images):
        masks = engine.store.masks(round=round_.number, source=round_.stage, image_id=image_id)
        yield Labelled(images[image_id], [_annotation(mask) for mask in masks])


def _annotation(mask: Mask) -> Annotation:
    """As an annotation of SA-1B: a person's mask has no scores."""
    extra = {"source": mask.source, "round": mask.round, "author": mask.author}
    if mask.label is not None:
        extra["label"] = mask.label
    return Annotation(id=0, rle=mask.rle, bbox=mask.bbox, area=mask.area, extra=extra)


def _write_shard(
    path: Path, number: int, images: Sequence[Labelled], made_with: dict[str, Any]
) -> ShardManifest:
    num_masks = 0
    with ShardWriter(path) as writer:
        for image, annotations in images:
            first = number * MASKS_PER_SHARD + num_masks
            suffix, data = _image_file(image)
            writer.add(image.key, suffix, data, _content(image, annotations, suffix, first))
            num_masks += len(annotations)
        written = writer.finish()
    manifest = ShardManifest(
        name=path.name,
        bytes=written.bytes,
        sha256=written.sha256,
        input={},
        images=len(images),
        masks=num_masks,
        images_without_masks=sum(not one.annotations for one in images),
        images_overfull=0,
        rejects={},
        damaged=[],
        made_with=made_with,
        image_files="untouched",
        code_version=code_version(),
        wall_clock={"mtime_ns": written.mtime_ns},
    )
    write_manifest(path, manifest)
    return manifest


def _image_file(image: Image) -> tuple[str, bytes]:
    """An image's file as it is; what SA-1B does not know becomes a PNG."""
    data = image_bytes(image)
    for magic, suffix in MAGIC:
        if data.startswith(magic):
            return suffix, data
    record = ImageRecord(image.key, image.size, (), lambda: decode_image(data, image.size))
    return "png", encode_record(record, suffix="png")["png"]


def _content(
    image: Image, annotations: Sequence[Annotation], suffix: str, first_id: int
) -> dict[str, Any]:
    record = ImageRecord(
        image.key,
        image.size,
        [replace(one, id=first_id + i) for i, one in enumerate(annotations)],
        lambda: decode_image(image_bytes(image), image.size),
    )
    file_name = f"{image.key}.{suffix}"
    return json_content(record, image_id=zlib.crc32(image.key.encode()), file_name=file_name)
