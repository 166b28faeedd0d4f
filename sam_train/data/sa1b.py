"""SA-1B shards as a stream: tar files of KEY.jpg and KEY.json, read by webdataset."""

from __future__ import annotations

import glob
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from webdataset import tariterators
from webdataset.gopen import gopen, rewrite_url
from webdataset.shardlists import expand_urls

from sam_train.data.shards import IMAGE_SUFFIXES, decode_record
from sam_train.data.source import (
    DamagedSampleError,
    DamageTally,
    sample_seed,
)
from sam_train.structures import ImageRecord

WHOLE_SHARDS_PER_READER = 8
"""From this many shards a reader on, an uneven split by whole shards counts as fair."""


class ImageCache:
    """Decoded images by name, up to a number of bytes; left behind when sent to another process."""

    def __init__(self) -> None:
        self.images: dict[str, np.ndarray] = {}
        self.num_bytes = 0

    def offer(self, name: str, image: np.ndarray, max_bytes: float) -> None:
        """Keeps the image if there is room; what is in stays, as an epoch runs round to it again."""
        if self.num_bytes + image.nbytes <= max_bytes:
            self.images[name] = image
            self.num_bytes += image.nbytes

    def __reduce__(self) -> tuple[type[ImageCache], tuple[()]]:
        return ImageCache, ()


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """SA-1B shards, local or remote.

    Readers take whole shards where these divide among them fairly, else every reader reads all shards
    and keeps every num_readers-th sample. Files other than images and JSON are not looked at, and
    nothing is ever unpickled.

    Two sources are equal if they read the same shards.

    Attributes:
        path: a file, a folder of .tar files, a glob, a brace expression, a URL as webdataset takes it,
            several of these joined by "::", or a list.
        name: the data set's name, for logs and per-source scores.
        seed: of the order, if shuffled.
        shuffle_buffer_mb: undecoded samples that each reader shuffles among.
        cache_mb: decoded images kept in memory, by all readers together.
        max_bad_fraction: of samples that may be damaged; each is logged and left out.
        allow_pipe: whether to take `pipe:` URLs, which run a shell command.
    """

    path: str | Sequence[str]
    allow_pipe: bool = False
    name: str = field(default="shards", compare=False)
    seed: int = field(default=0, compare=False)
    shuffle_buffer_mb: float = field(default=64, compare=False)
    cache_mb: float = field(default=0, compare=False)
    max_bad_fraction: float = field(default=0.05, compare=False)
    _cache: ImageCache = field(default_factory=ImageCache, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is in [0, 1], got {self.max_bad_fraction}")

    def shards(self) -> list[str]:
        """The shards, in a fixed order.

        Raises:
            FileNotFoundError: nothing lies at the path.
            ValueError: a shard is a `pipe:` and those are not allowed.
        """
        paths = [self.path] if isinstance(self.path, str) else list(self.path)
        shards = [shard for path in paths for shard in _expand(str(path))]
        for shard in shards:
            # webdataset may rewrite a URL before it opens it, so the outcome is what counts.
            if not self.allow_pipe and urlparse(rewrite_url(shard)).scheme == "pipe":
                raise ValueError(
                    f"{shard!r} would run a shell command; set allow_pipe=true if that is wanted"
                )
        if not shards:
            raise FileNotFoundError(
                f"no shards at {self._path_text()}: expected .tar files of KEY.jpg and KEY.json, "
                "as sam-convert writes them. For a named set, conf/data says where to get it, and "
                "paths.data (the variable SAM_TRAIN_DATA) where it is looked for"
            )
        absent = [shard for shard in shards if _is_local(shard) and not Path(shard).is_file()]
        if absent:
            raise FileNotFoundError(
                f"no file {absent[0]}"
                + (f" (and {len(absent) - 1} more)" if len(absent) > 1 else "")
                + f", which {self._path_text()} names"
            )
        return shards

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool
    ) -> Iterator[ImageRecord]:
        """See `Source.records`; damaged samples are counted, and left out here or when looked at."""
        shards = self.shards()
        order = random.Random(sample_seed(self.seed, epoch, "shards"))
        if shuffle:
            order.shuffle(shards)
        by_shard = splits_by_shard(len(shards), num_readers)
        tally = DamageTally(self.name, self.max_bad_fraction)
        samples = _samples(shards[reader::num_readers] if by_shard else shards, tally)
        if shuffle:
            # Where all read all, all must shuffle alike.
            stream = reader if by_shard else 0
            buffer = random.Random(sample_seed(self.seed, epoch, f"samples/{stream}"))
            samples = _shuffled(samples, buffer, self.shuffle_buffer_mb * 2**20)
        for index, sample in enumerate(samples):
            if by_shard or index % num_readers == reader:
                try:
                    yield self._record(sample, tally, num_readers)
                except DamagedSampleError:
                    continue
        tally.finish()

    def _record(self, sample: dict[str, Any], tally: DamageTally, num_readers: int) -> ImageRecord:
        tally.seen += 1
        key = sample["__key__"].removeprefix("./")
        name = f"{sample['__url__']}:{key}"
        files = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
        try:
            record = decode_record(key, files, self.name)
        except ValueError as error:
            raise tally.damaged(name, error) from None
        cache_bytes = self.cache_mb * 2**20 / num_readers
        return replace(
            record,
            load=partial(self._load, name, record.load, tally, cache_bytes),
            damaged=partial(tally.damaged, name),
        )

    def _load(
        self, name: str, load: Callable[[], np.ndarray], tally: DamageTally, cache_bytes: float
    ) -> np.ndarray:
        image = self._cache.images.get(name)
        if image is None:
            try:
                image = load()
            except ValueError as error:
                raise tally.damaged(name, error) from None
            self._cache.offer(name, image, cache_bytes)
        return image

    def _path_text(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(map(str, self.path))


def splits_by_shard(num_shards: int, num_readers: int) -> bool:
    """Whether readers take whole shards: an even number each, or so many that one more is little."""
    return num_shards % num_readers == 0 or num_shards >= WHOLE_SHARDS_PER_READER * num_readers


def _expand(path: str) -> list[str]:
    """One entry of a path to shards: braces, then a folder's tar files or a glob's matches."""
    if os.path.exists(path):  # a name with braces or brackets in it means itself
        return sorted(map(str, Path(path).glob("*.tar"))) if Path(path).is_dir() else [path]
    shards = []
    for url in expand_urls(path):
        if not _is_local(url):
            shards.append(url)
        elif Path(url).is_dir():
            shards += sorted(map(str, Path(url).glob("*.tar")))
        else:
            shards += sorted(glob.glob(url, recursive=True)) if glob.has_magic(url) else [url]
    return shards


def _is_local(url: str) -> bool:
    return urlparse(url).scheme == "" and url != "-"


def _samples(shards: Iterable[str], tally: DamageTally) -> Iterator[dict[str, Any]]:
    """Files grouped by key, as they lie; a shard that breaks off is counted and read no further."""
    for shard in shards:
        try:
            with gopen(shard) as stream:
                files = tariterators.tar_file_expander(
                    [{"url": shard, "stream": stream}], select_files=_is_wanted
                )
                yield from tariterators.group_by_keys(files)
        except Exception as error:  # whatever the URL's scheme, tarfile and webdataset raise
            tally.seen += 1
            tally.damaged(shard, error.args[0] if error.args else error)


def _is_wanted(file_name: str) -> bool:
    return file_name.lower().endswith((".json", *(f".{suffix}" for suffix in IMAGE_SUFFIXES)))


def _shuffled(
    samples: Iterable[dict[str, Any]], order: random.Random, max_bytes: float
) -> Iterator[dict[str, Any]]:
    """Gives out samples at random from a buffer of `max_bytes`, and at the end what is left in it."""
    buffer: list[dict[str, Any]] = []
    num_bytes = 0

    def draw() -> dict[str, Any]:
        index = order.randrange(len(buffer))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        return buffer.pop()

    for sample in samples:
        buffer.append(sample)
        num_bytes += _num_bytes(sample)
        while num_bytes > max_bytes and buffer:
            drawn = draw()
            num_bytes -= _num_bytes(drawn)
            yield drawn
    while buffer:
        yield draw()


def _num_bytes(sample: dict[str, Any]) -> int:
    return sum(len(data) for data in sample.values() if isinstance(data, bytes))
