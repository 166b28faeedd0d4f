"""The automatic masks of a round, which lie in shards and not in rows: found again, sampled, and shown."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from data_engine.mask_store.rows import chunks
from data_engine.mask_store.store import Store
from data_engine.records import Image, Shard
from data_engine.shard_writer import ShardManifest, finished
from sam_train.data.annotations import decode_annotations
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import IMAGE_SUFFIXES, decode_image
from sam_train.data.source import sample_seed
from sam_train.data.tar_samples import local_path, read_samples
from sam_train.structures import Annotation

log = logging.getLogger(__name__)

KEYS_AT_ONCE = 512


class WrittenShard(NamedTuple):
    """A shard of the engine's own where it lies.

    Attributes:
        shard: its row.
        path: a file or a URL.
        manifest: None for one that is gone, damaged or no file of this machine.
    """

    shard: Shard
    path: str
    manifest: ShardManifest | None

    @property
    def is_there(self) -> bool:
        """Whether it can be read, as far as can be told without doing so."""
        return self.manifest is not None or local_path(self.path) is None


@dataclass(frozen=True)
class AutomaticImage:
    """An image of an automatic shard with its masks.

    Attributes:
        image: as registered.
        shard: its row.
        path: of the shard.
        offset: byte there of a file of the sample before, or of its own first one.
        annotations: its masks.
    """

    image: Image
    shard: Shard
    path: str
    offset: int
    annotations: Sequence[Annotation]

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB as the model saw them: what was blurred before stays so.

        Raises:
            OSError: the shard cannot be read, or has changed.
        """
        for sample in islice(read_samples(self.path, is_wanted, self.offset), 2):
            files = sample.files
            data = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), b"")
            if sample.key == self.image.key and data:
                return decode_image(data, self.image.size)
        raise OSError(f"{self.path} has no image {self.image.key} where it was: it has changed")


def automatic_shards(store: Store, root: Path, round_number: int) -> list[WrittenShard]:
    """The automatic shards of a round, by path; `shard.path` is relative to `root`, or a URL."""
    shards = store.shards(round=round_number, source="automatic")
    return [_written(shard, root) for shard in shards if shard.num_images]


def _written(shard: Shard, root: Path) -> WrittenShard:
    if local_path(shard.path) is None:
        return WrittenShard(shard, shard.path, None)
    path = root / shard.path
    return WrittenShard(shard, str(path), finished(path))


def sample_images(
    store: Store, shards: Sequence[WrittenShard], num_images: int, *, seed: int, with_masks: bool
) -> list[AutomaticImage]:
    """Images drawn from shards without replacement; those that were taken down are never among them.

    The hashes of their keys with the seed decide: the same images come again, in the same order, however
    the shards are cut, and a smaller sample is the beginning of a larger one.

    Args:
        store: knows the images.
        shards: to draw from, all there.
        num_images: to draw; all are given where there are fewer.
        seed: of the draw.
        with_masks: leave out images on which no mask was found.
    """
    found = (
        one
        for own in shards
        for one in _known_images(store, own)
        if one.annotations or not with_masks
    )
    return heapq.nsmallest(
        num_images, found, key=lambda one: (sample_seed(seed, 0, one.image.key), one.image.key)
    )


def find_images(
    store: Store, shards: Sequence[WrittenShard], image_ids: Collection[str]
) -> dict[str, AutomaticImage]:
    """These images where they lie, by id; without those that are in none of the shards."""
    found: dict[str, AutomaticImage] = {}
    for own in shards:
        for one in _known_images(store, own):
            if one.image.id in image_ids:
                found[one.image.id] = one
        if len(found) == len(image_ids):
            break
    return found


def _known_images(store: Store, written: WrittenShard) -> Iterator[AutomaticImage]:
    for chunk in chunks(_samples(written), KEYS_AT_ONCE):
        known = store.images_by_key([key for key, _, _ in chunk])
        for key, offset, data in chunk:
            if key in known:
                image = known[key]
                entries = msgspec.json.decode(data)["annotations"]
                masks = decode_annotations(entries, image.size)
                yield AutomaticImage(image, written.shard, written.path, offset, masks)


def _samples(written: WrittenShard) -> Iterator[tuple[str, int, bytes]]:
    """Key, place and JSON of each sample; the images are passed over unread."""
    before, json_at = 0, 0
    for sample in read_samples(written.path, lambda name: name.endswith(".json")):
        yield sample.key, before, sample.files["json"]
        # Where only JSON is asked for, what ends a sample is the next JSON, behind the next image: that
        # image lies after the JSON before.
        before, json_at = json_at, sample.end
