"""Tells the files that a training reads from others, wherever they lie, for its checkpoints."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import PurePath

from sam_train.data.coco import CocoItems, PanopticItems
from sam_train.data.folder import FolderItems
from sam_train.data.image_pairs import PairItems
from sam_train.data.indexed import IndexedSource, Items
from sam_train.data.listed import ListedSource
from sam_train.data.mixture import MixtureSource
from sam_train.data.sa1b import ShardSource
from sam_train.data.source import HeldOut, Source
from sam_train.data.tar_samples import local_path

MOST_SIZES = 1000
"""How many images of a folder are asked for their size: their number has no limit as that of shards has."""


def fingerprint(source: Source) -> str:
    """A digest of a source's files by name and bytes; empty where it has none, as a synthetic one.

    Folders above the data and times do not count, as data is copied about. Of a URL the name counts, of
    a COCO file its size and the names of its images, of a folder all names and the sizes of
    `MOST_SIZES` images, evenly spread.

    Raises:
        FileNotFoundError, ValueError: there is nothing to read.
    """
    digest, is_empty = hashlib.blake2b(digest_size=16), True
    for text in (text for one in leaves(source) for text in _facts(one)):
        digest.update(f"{text}\n".encode(errors="surrogateescape"))
        is_empty = False
    return "" if is_empty else digest.hexdigest()


def leaves(source: Source) -> Iterator[Source]:
    """The sources that read files themselves, of those that a mixture draws from or that part of is left out of."""
    if isinstance(source, MixtureSource):
        for one in source.sources.values():
            yield from leaves(one)
    elif isinstance(source, HeldOut | ListedSource):
        yield from leaves(source.source)
    else:
        yield source


def _facts(source: Source) -> Iterator[str]:
    if isinstance(source, ShardSource):
        shards = source.shards()
        yield f"{len(shards)} shards"
        yield from (f"{PurePath(shard).name} {_size(local_path(shard))}" for shard in shards)
    elif isinstance(source, IndexedSource):
        yield f"{len(source.items)} images"
        yield from _facts_of_items(source.items)


def _facts_of_items(items: Items) -> Iterator[str]:
    if isinstance(items, CocoItems | PanopticItems):
        yield f"{items.index.stamp[0]} {items.index.names}"
    elif isinstance(items, FolderItems):
        yield from items.pairs.keys
        yield from _some_sizes(items.pairs.images)
    elif isinstance(items, PairItems) and len(items):
        # They are sorted, so what the first and the last begin with, all do.
        start = os.path.commonprefix([items.names[0], items.names[-1]]).rfind(os.sep) + 1
        yield from (name[start:] for name in items.names)
        yield from _some_sizes([f"{name}.json" for name in _spread(items.names)])


def _some_sizes(paths: Sequence[str]) -> Iterator[str]:
    return (_size(path) for path in _spread(paths))


def _spread(paths: Sequence[str]) -> list[str]:
    return [paths[place] for place in range(0, len(paths), -(-len(paths) // MOST_SIZES) or 1)]


def _size(path: str | None) -> str:
    """In bytes; nothing for what is no local file, or is gone: its reader says that."""
    if path is not None:
        with suppress(OSError):
            return str(os.path.getsize(path))
    return ""
