"""Data sets whose images can be read in any order, as a `Source`: COCO, folders, SA-1B directories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from sam_train.data.source import (
    DamagedSampleError,
    DamageTally,
    ImageCache,
    UnusableSourceError,
    sample_seed,
)
from sam_train.structures import Cursor, ImageRecord

READ_ERRORS = (ValueError, OSError, LookupError, TypeError, OverflowError)
"""What a file of somebody else's making may raise where it is not as expected."""


class Items(Protocol):
    """A data set's images by number. Two are equal if they are of the same files."""

    def __len__(self) -> int:
        """How many images there are; the first call may take a while, as it looks for them.

        Raises:
            FileNotFoundError, ValueError: there is no such data set; the message says what was expected.
        """
        ...

    def describe(self, index: int) -> str:
        """The image's name, for the log."""
        ...

    def record(self, index: int) -> ImageRecord:
        """One image with its masks; its pixels are decoded when they are looked at.

        Raises:
            ValueError: what is wrong with it.
            UnusableSourceError: what is wrong with the whole data set.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class IndexedSource:
    """A `Source` of `Items`: an epoch is one permutation of all, dealt out to the readers in turn.

    Two sources are equal if they are of the same files.

    Attributes:
        items: the images.
        name: the data set's name, for logs and per-source scores.
        seed: of the order, if shuffled.
        cache_mb: decoded images kept in memory, by all readers together.
        max_bad_fraction: of images that may be damaged; each is logged and left out.
    """

    items: Items
    name: str = field(default="images", compare=False)
    seed: int = field(default=0, compare=False)
    cache_mb: float = field(default=0, compare=False)
    max_bad_fraction: float = field(default=0.05, compare=False)
    _cache: ImageCache = field(default_factory=ImageCache, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is in [0, 1], got {self.max_bad_fraction}")

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool, start: Cursor = ()
    ) -> Iterator[ImageRecord]:
        """See `Source.records`; damaged images are counted, and left out here or when looked at."""
        order = np.arange(len(self.items))
        if shuffle:
            order = np.random.default_rng(sample_seed(self.seed, epoch, "order")).permutation(order)
        mine = order[reader::num_readers]
        num_done, seen, num_bad = start or (0, 0, 0)
        tally = DamageTally(self.name, self.max_bad_fraction, seen, num_bad)
        for place in range(num_done, len(mine)):
            tally.seen += 1
            try:
                record = self._record(int(mine[place]), tally, num_readers)
            except DamagedSampleError:
                continue
            yield replace(record, cursor=(place + 1, tally.seen, tally.num_bad))
        tally.finish()

    def _record(self, index: int, tally: DamageTally, num_readers: int) -> ImageRecord:
        name = self.items.describe(index)
        try:
            record = self.items.record(index)
        except UnusableSourceError:
            raise
        except READ_ERRORS as error:
            raise tally.damaged(name, error) from None
        max_bytes = self.cache_mb * 2**20 / num_readers
        return replace(self._cache.serve(name, record, tally, max_bytes), source=self.name)
