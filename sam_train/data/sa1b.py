"""SA-1B shards as a stream: tar files of KEY.jpg and KEY.json."""

from __future__ import annotations

import glob
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from webdataset.gopen import rewrite_url
from webdataset.shardlists import expand_urls

from sam_train.data.shards import IMAGE_SUFFIXES, decode_record
from sam_train.data.source import (
    DamagedSampleError,
    DamageTally,
    ImageCache,
    sample_seed,
)
from sam_train.data.tar_samples import TarSample, local_path, read_samples
from sam_train.data.urls import is_of_fsspec, listed
from sam_train.structures import Cursor, ImageRecord

WHOLE_SHARDS_PER_READER = 8
"""From this many shards a reader on, an uneven split by whole shards counts as fair."""

END = 2**62
"""A byte behind the end of any shard."""


class WindowStart(NamedTuple):
    """Where a window of samples to shuffle among begins in a reader's shards.

    Attributes:
        shard: number in the reader's order.
        byte: in that shard.
        samples: how many came before it.
    """

    shard: int = 0
    byte: int = 0
    samples: int = 0


class _Item(NamedTuple):
    """A sample, or in its place what is wrong with the rest of a shard."""

    shard: str
    sample: TarSample | None
    broken: str = ""

    @property
    def num_bytes(self) -> int:
        return 1 if self.sample is None else self.sample.num_bytes

    @property
    def end(self) -> int:
        """Byte at which the next one begins: beyond all where the shard is broken off."""
        return END if self.sample is None else self.sample.end


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
        shuffle_buffer_mb: undecoded samples that each reader shuffles among, one such window after
            the other.
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
        stated = [self.path] if isinstance(self.path, str) else list(self.path)
        shards = [shard for path in stated for shard in _expand(str(path))]
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
        paths = [local_path(shard) for shard in shards]
        absent = [path for path in paths if path is not None and not Path(path).is_file()]
        if absent:
            raise FileNotFoundError(
                f"no file {absent[0]}"
                + (f" (and {len(absent) - 1} more)" if len(absent) > 1 else "")
                + f", which {self._path_text()} names"
            )
        return shards

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool, start: Cursor = ()
    ) -> Iterator[ImageRecord]:
        """See `Source.records`; damaged samples are counted, and left out here or when looked at.

        Shuffled within windows of `shuffle_buffer_mb` that are read one after the other: to go on, a
        reader opens the one shard in which its window begins, there.
        """
        shards = self.shards()
        if shuffle:
            random.Random(sample_seed(self.seed, epoch, "shards")).shuffle(shards)
        by_shard = splits_by_shard(len(shards), num_readers)
        if by_shard:
            shards = shards[reader::num_readers]
        # Where all read all, all must shuffle alike.
        stream = reader if by_shard else 0
        first, num_given, seen, num_bad = start or (WindowStart(), 0, 0, 0)
        tally = DamageTally(self.name, self.max_bad_fraction, seen, num_bad)
        max_bytes = self.shuffle_buffer_mb * 2**20 if shuffle else 0
        for window, items in _windows(shards, WindowStart(*first), max_bytes):
            order = list(range(len(items)))
            if shuffle:
                name = f"samples/{stream}/{window.shard}/{window.byte}"
                random.Random(sample_seed(self.seed, epoch, name)).shuffle(order)
            for place in range(num_given, len(items)):
                item = items[order[place]]
                # Let go of what was given out: the window would else be held to its end.
                items[order[place]] = None
                if item is None or not (
                    by_shard or (window.samples + place) % num_readers == reader
                ):
                    continue
                try:
                    record = self._record(item, tally, num_readers)
                except DamagedSampleError:
                    continue
                yield replace(record, cursor=(tuple(window), place + 1, tally.seen, tally.num_bad))
            num_given = 0
        tally.finish()

    def _record(self, item: _Item, tally: DamageTally, num_readers: int) -> ImageRecord:
        tally.seen += 1
        if item.sample is None:
            raise tally.damaged(item.shard, item.broken)
        key, files, _ = item.sample
        name = f"{item.shard}:{key}"
        try:
            record = decode_record(key, files, self.name)
        except ValueError as error:
            raise tally.damaged(name, error) from None
        max_bytes = self.cache_mb * 2**20 / num_readers
        return self._cache.serve(name, record, tally, max_bytes)

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
        if is_of_fsspec(url):
            found = listed(url)
            shards += [one for one in found if one.endswith(".tar")] or found
        elif local_path(url) != url:
            shards.append(url)
        elif Path(url).is_dir():
            shards += sorted(map(str, Path(url).glob("*.tar")))
        else:
            shards += sorted(glob.glob(url, recursive=True)) if glob.has_magic(url) else [url]
    return shards


def _windows(
    shards: Sequence[str], start: WindowStart, max_bytes: float
) -> Iterator[tuple[WindowStart, list[_Item | None]]]:
    """The samples of all shards in windows of a little more than `max_bytes`, from one's start on."""
    items: list[_Item | None] = []
    num_bytes = 0
    for shard in range(start.shard, len(shards)):
        byte = start.byte if shard == start.shard else 0
        if byte == END:
            continue
        for item in _items(shards[shard], byte):
            items.append(item)
            num_bytes += item.num_bytes
            if num_bytes > max_bytes:
                following = WindowStart(shard, item.end, start.samples + len(items))
                yield start, items
                start, items, num_bytes = following, [], 0
    if items:
        yield start, items


def _items(shard: str, start: int) -> Iterator[_Item]:
    """A shard's samples, and what is wrong with it at the end."""
    is_empty = start == 0
    try:
        for sample in read_samples(shard, is_wanted, start):
            is_empty = False
            yield _Item(shard, sample)
    except Exception as error:  # whatever the URL's scheme and tarfile raise
        yield _Item(shard, None, str(error.args[0] if error.args else error))
    else:
        if is_empty:
            yield _Item(shard, None, "it holds no image and no JSON")


def is_wanted(file_name: str) -> bool:
    """Whether a file of a shard, named in lower case, belongs to a sample."""
    return file_name.endswith((".json", *(f".{suffix}" for suffix in IMAGE_SUFFIXES)))
