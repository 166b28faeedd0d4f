"""One unit of a conversion: its records to finished shards, going on where an earlier run was cut off."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sam_train.convert.sample import ShardSettings, make_sample, safe_key
from sam_train.convert.tar_writer import TarWriter
from sam_train.data.source import DamagedSampleError, Source
from sam_train.ops.files import write_atomically
from sam_train.structures import Cursor, ImageRecord

MASKS_PER_UNIT, IMAGES_PER_UNIT = 10**7, 10**6
"""Numbers set aside for each unit, so that all are unique without the units knowing of each other."""


@dataclass(frozen=True)
class Unit:
    """A reader's share of a split.

    Attributes:
        split: "train" or "val".
        number: which reader.
        count: of how many.
        first_number: how many units other splits have before it.
    """

    split: str
    number: int
    count: int
    first_number: int


@dataclass(kw_only=True)
class Part:
    """What is known of a finished shard of a unit, kept beside it; the shard itself is absent if empty.

    Attributes:
        split: the unit's.
        cursor: where the unit's records go on.
        is_last: whether there are none after it.
        keys: of its images.
        num_masks, num_small, num_empty: masks, masks dropped for their area, images without any.
        damaged: names and reasons.
        num_bytes, sha256: of the tar.
    """

    split: str
    cursor: Any = ()
    is_last: bool = False
    keys: list[str] = field(default_factory=list)
    num_masks: int = 0
    num_small: int = 0
    num_empty: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)
    num_bytes: int = 0
    sha256: str = ""


class Progress(NamedTuple):
    """News of a unit: images done since the last, and a shard if one was finished."""

    num_images: int
    part: Part | None = None


def part_path(folder: Path, unit: Unit, number: int, suffix: str) -> Path:
    """Where a unit's shard lies until all are there, or (`json`) what is known of it."""
    return folder / f"{unit.split}-{unit.number:06d}-{number:06d}.{suffix}"


def finished_parts(folder: Path, unit: Unit) -> list[Part]:
    """What earlier runs finished of a unit."""
    parts: list[Part] = []
    while (path := part_path(folder, unit, len(parts), "json")).is_file():
        parts.append(Part(**json.loads(path.read_text())))
    return parts


def convert_unit(
    source: Source, unit: Unit, folder: Path, settings: ShardSettings
) -> Iterator[Progress]:
    """Writes what is missing of a unit; the same bytes whenever and however often it is begun."""
    parts = finished_parts(folder, unit)
    if parts and parts[-1].is_last:
        return
    start: Cursor = _tuples(parts[-1].cursor) if parts else ()
    writing = _Writing(
        unit=unit,
        folder=folder,
        settings=settings,
        number=len(parts),
        num_images=sum(len(part.keys) for part in parts),
        num_masks=sum(part.num_masks for part in parts),
    )
    unreported, reported_at = 0, time.monotonic()
    with _damage_noted(writing):
        for record in source.records(
            epoch=0, reader=unit.number, num_readers=unit.count, shuffle=False, start=start
        ):
            unreported += 1
            try:
                writing.add(record)
            except DamagedSampleError:
                continue
            if writing.is_full:
                yield Progress(unreported, writing.finish(record.cursor))
                unreported, reported_at = 0, time.monotonic()
            elif time.monotonic() - reported_at > 1:
                yield Progress(unreported)
                unreported, reported_at = 0, time.monotonic()
        yield Progress(unreported, writing.finish((), is_last=True))


@dataclass(kw_only=True)
class _Writing:
    """The open shard of a unit, and how many images and masks the unit has had."""

    unit: Unit
    folder: Path
    settings: ShardSettings
    number: int
    num_images: int
    num_masks: int
    part: Part = field(init=False)
    tar: TarWriter | None = None

    def __post_init__(self) -> None:
        self.part = Part(split=self.unit.split)

    def add(self, record: ImageRecord) -> None:
        unit_number = self.unit.first_number + self.unit.number
        sample = make_sample(
            record,
            key := self._key(record),
            image_id=unit_number * IMAGES_PER_UNIT + self.num_images,
            first_id=unit_number * MASKS_PER_UNIT + self.num_masks,
            settings=self.settings,
        )
        self.part.num_small += sample.num_small
        if sample.files is None:
            self.part.num_empty += 1
            return
        self.num_images += 1
        self.num_masks += sample.num_masks
        if self.num_images > IMAGES_PER_UNIT or self.num_masks > MASKS_PER_UNIT:
            raise ValueError(
                f"more than {IMAGES_PER_UNIT} images or {MASKS_PER_UNIT} masks in one piece of the "
                "data: split its largest shard, or lower images_per_shard"
            )
        if self.tar is None:
            self.tar = TarWriter(part_path(self.folder, self.unit, self.number, "tar"))
        self.tar.add(key, sample.files)
        self.part.keys.append(key)
        self.part.num_masks += sample.num_masks

    @property
    def is_full(self) -> bool:
        return self.tar is not None and (
            len(self.part.keys) >= self.settings.images_per_shard
            or self.tar.num_bytes >= self.settings.shard_mb * 2**20
        )

    def finish(self, cursor: Cursor, *, is_last: bool = False) -> Part:
        """Closes the shard, and only then writes what is known of it: that is what makes it count."""
        part, self.part = self.part, Part(split=self.unit.split)
        part.cursor, part.is_last = cursor, is_last
        if self.tar is not None:
            part.num_bytes, part.sha256 = self.tar.finish()
            self.tar = None
        path = part_path(self.folder, self.unit, self.number, "json")
        write_atomically(path, partial(_dump, asdict(part)))
        self.number += 1
        return part

    def _key(self, record: ImageRecord) -> str:
        if self.settings.keys == "numbered":
            return f"{self.unit.split}_{self.unit.number:06d}_{self.num_images:06d}"
        return safe_key(record.key)


def _dump(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Job:
    """What every process is sent: `convert_unit` for the units of some splits."""

    splits: Mapping[str, Source]
    folder: Path
    settings: ShardSettings

    def __call__(self, unit: Unit) -> Iterator[Progress]:
        return convert_unit(self.splits[unit.split], unit, self.folder, self.settings)


@contextmanager
def _damage_noted(writing: _Writing) -> Iterator[None]:
    """Takes down what the source says is damaged, instead of having every process print it."""
    logger = logging.getLogger("sam_train.data.source")
    handler, propagates = _Notes(writing), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class _Notes(logging.Handler):
    def __init__(self, writing: _Writing) -> None:
        super().__init__()
        self.writing = writing

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and "is damaged and left out" in str(record.msg):
            self.writing.part.damaged.append((str(record.args[1]), str(record.args[2])))
