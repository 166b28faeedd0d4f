"""What a data set must offer, and how damaged parts of one are counted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from sam_train.structures import ImageRecord

log = logging.getLogger(__name__)


class Source(Protocol):
    """A data set as a stream of images with their masks."""

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool
    ) -> Iterator[ImageRecord]:
        """The part of one epoch that falls to one of several readers.

        A pure function of its arguments and the source's own seed, so that a stream can be taken up
        where it was left; the readers of an epoch see every sample exactly once between them.
        """
        ...


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """63 bits from which everything random about a sample in an epoch derives.

    The same for any number of processes and workers, and on any machine (`hash` is not).
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Keeps a share of another source, or the rest of it, by a hash of the keys.

    Attributes:
        source: what is divided.
        share: the share, in [0, 1], that is held out.
        keep: "held_out" or "rest".
    """

    source: Source
    share: float
    keep: str

    def __post_init__(self) -> None:
        if self.keep not in ("held_out", "rest"):
            raise ValueError(f"keep is 'held_out' or 'rest', got {self.keep!r}")

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool
    ) -> Iterator[ImageRecord]:
        for record in self.source.records(
            epoch=epoch, reader=reader, num_readers=num_readers, shuffle=shuffle
        ):
            is_held_out = sample_seed(0, 0, record.key) < self.share * 2**63
            if is_held_out == (self.keep == "held_out"):
                yield record


class DamagedSampleError(ValueError):
    """One sample cannot be read; it has been counted and logged, so skip it."""


class UnusableSourceError(ValueError):
    """A source cannot be used; the message says why."""


def readable(records: Iterable[ImageRecord]) -> Iterator[ImageRecord]:
    """Decodes each record's pixels and leaves out those that cannot be."""
    for record in records:
        try:
            record.image  # noqa: B018  a cached property
        except DamagedSampleError:
            continue
        yield record


@dataclass
class DamageTally:
    """Counts what cannot be read in one pass over a source.

    Attributes:
        source: the data set's name.
        max_bad_fraction: the share of damaged samples that is still let pass.
        seen: samples met, damaged or not.
        bad: names of the damaged ones.
    """

    source: str
    max_bad_fraction: float
    seen: int = 0
    bad: list[str] = field(default_factory=list)

    # A pass is judged at its end; before that, only by more damage than its first samples may hold.
    GRACE = 100

    def damaged(self, name: str, reason: object) -> DamagedSampleError:
        """Logs a damaged sample and returns the error to skip it by; raises if it is one too many."""
        self.bad.append(name)
        log.warning("%s: %s is damaged and left out: %s", self.source, name, reason)
        self._check(max(self.seen, self.GRACE))
        return DamagedSampleError(f"{name}: {reason}")

    def finish(self) -> None:
        """Judges the whole pass."""
        if self.bad:
            log.warning("%s: %d of %d samples are damaged", self.source, len(self.bad), self.seen)
        self._check(self.seen)

    def _check(self, seen: int) -> None:
        if len(self.bad) > self.max_bad_fraction * seen:
            names = ", ".join(self.bad[:5]) + (", ..." if len(self.bad) > 5 else "")
            raise UnusableSourceError(
                f"{self.source}: {len(self.bad)} of {self.seen} samples read are damaged ({names}), "
                f"more than max_bad_fraction={self.max_bad_fraction} allows; each is named with its "
                "reason in the log. Mend the shards, or raise max_bad_fraction"
            )
