"""Lists of shards: whether they are those of before, and whether readers read far more than their share."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import PurePath

from sam_train.data.fingerprint import leaves
from sam_train.data.sa1b import WHOLE_SHARDS_PER_READER, ShardSource, splits_by_shard
from sam_train.data.source import Source
from sam_train.data.tar_samples import local_path

log = logging.getLogger(__name__)

MUCH = 10**11
"""Bytes an epoch from which it is worth a word that they are read for nothing."""


def shard_list(source: Source) -> str:
    """Tells one list of shards from another, by their number and names; empty where there are none.

    A place in the stream is one of this list. The folders do not count: data may be moved.
    """
    lists = [[PurePath(name).name for name in one.shards()] for one in _shard_sources(source)]
    if not lists:
        return ""
    text = "\n".join(f"{len(names)} {' '.join(names)}" for names in lists)
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return f"{sum(map(len, lists))} shards ({digest})"


def warn_of_rereading(source: Source, num_readers: int) -> None:
    """Warns where each reader reads all shards, to keep its share of the samples, and that is much."""
    for shards in _shard_sources(source):
        names = shards.shards()
        if splits_by_shard(len(names), num_readers):
            continue
        paths = [path for path in map(local_path, names) if path is not None]
        for_nothing = (num_readers - 1) * sum(map(os.path.getsize, paths))
        if for_nothing < MUCH:
            continue
        log.warning(
            "%s: its %d shards do not divide among %d readers (processes x data.num_workers), so each reads "
            "all of them: %.0f GB more an epoch. Readers take whole shards if their number divides that "
            "of the shards, or from %d shards on: sam-convert with a lower images_per_shard makes more",
            shards.name,
            len(names),
            num_readers,
            for_nothing / 1e9,
            WHOLE_SHARDS_PER_READER * num_readers,
        )


def _shard_sources(source: Source) -> list[ShardSource]:
    return [one for one in leaves(source) if isinstance(one, ShardSource)]
