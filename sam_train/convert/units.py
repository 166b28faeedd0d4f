"""A source in parts that are converted apart from each other, the same ones each time."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import replace

from sam_train.data.coco import CocoItems, PanopticItems
from sam_train.data.indexed import IndexedSource
from sam_train.data.listed import ListedSource
from sam_train.data.mixture import MixtureSource
from sam_train.data.sa1b import ShardSource
from sam_train.data.source import HeldOut, Source
from sam_train.data.tar_samples import local_path

OF_OTHERS = 8
"""Units of a source that does not say how large it is."""


def count_units(source: Source, images_per_shard: int) -> int:
    """In how many readers' shares a source is converted: about one a shard, whoever reads it.

    Raises:
        FileNotFoundError, ValueError: there is nothing to read.
    """
    if isinstance(source, ListedSource):
        return count_units(source.source, images_per_shard)
    if isinstance(source, HeldOut):
        whole = count_units(source.source, images_per_shard)
        # With any other number of readers than that of the shards, each might read all of them.
        share = 1 if _reads_shards(source.source) else kept_share(source)
        return max(1, math.ceil(share * whole))
    if isinstance(source, IndexedSource):
        return max(1, math.ceil(len(source.items) / images_per_shard))
    if isinstance(source, ShardSource):
        return len(source.shards())
    return OF_OTHERS


def _reads_shards(source: Source) -> bool:
    if isinstance(source, HeldOut | ListedSource):
        return _reads_shards(source.source)
    return isinstance(source, ShardSource)


def kept_share(source: Source) -> float:
    """What share of the images that a source reads it gives out, as far as `HeldOut` decides on it.

    Of a mixture it is that of the source with the least.
    """
    if isinstance(source, HeldOut):
        return source.share if source.keep == "held_out" else 1 - source.share
    if isinstance(source, ListedSource):
        return kept_share(source.source)
    if isinstance(source, MixtureSource):
        return min(map(kept_share, source.sources.values()))
    return 1


def tolerant(source: Source) -> Source:
    """A source that leaves it to its user to judge how much damage is too much."""
    if isinstance(source, HeldOut | ListedSource):
        return replace(source, source=tolerant(source.source))
    if isinstance(source, MixtureSource):
        return replace(
            source, sources={name: tolerant(one) for name, one in source.sources.items()}
        )
    if isinstance(source, IndexedSource | ShardSource):
        return replace(source, max_bad_fraction=1.0)
    return source


def fingerprint(source: Source) -> str:
    """Tells a source's files from others: by names, and sizes of shards, or by the stamp of a COCO file.

    Raises:
        FileNotFoundError, ValueError: there is nothing to read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for text in _facts(source):
        digest.update(f"{text}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _facts(source: Source) -> Iterator[str]:
    if isinstance(source, HeldOut | ListedSource):
        yield from _facts(source.source)
    elif isinstance(source, MixtureSource):
        for name, one in source.sources.items():
            yield name
            yield from _facts(one)
    elif isinstance(source, ShardSource):
        for shard in source.shards():
            path = local_path(shard)
            yield shard if path is None else f"{shard} {os.path.getsize(path)}"
    elif isinstance(source, IndexedSource):
        items = source.items
        if isinstance(items, CocoItems | PanopticItems):
            yield f"{len(items)} {items.index.stamp}"
        else:
            yield from map(items.describe, range(len(items)))
