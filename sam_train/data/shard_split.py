"""Whether readers read far more of the shards than their share."""

from __future__ import annotations

import logging
import os

from sam_train.data.fingerprint import leaves
from sam_train.data.sa1b import WHOLE_SHARDS_PER_READER, ShardSource, splits_by_shard
from sam_train.data.source import Source
from sam_train.data.tar_samples import local_path

log = logging.getLogger(__name__)

MUCH = 10**11
"""Bytes an epoch from which it is worth a word that they are read for nothing."""


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
