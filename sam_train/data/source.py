"""What a data set must offer, and how damaged parts of one are counted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
from PIL import Image

from sam_train.structures import Cursor, ImageRecord

log = logging.getLogger(__name__)


class Source(Protocol):
    """A data set as a stream of images with their masks."""

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool, start: Cursor = ()
    ) -> Iterator[ImageRecord]:
        """The part of one epoch that falls to one of several readers.

        A pure function of its arguments and the source's own seed; the readers of an epoch see every
        sample exactly once between them. Each record carries a cursor: given back as `start`, with the
        other arguments unchanged, the stream goes on with the record after it, without reading again
        what came before. Cursors are plain values, to be kept in checkpoints.
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
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool, start: Cursor = ()
    ) -> Iterator[ImageRecord]:
        """See `Source.records`."""
        for record in self.source.records(
            epoch=epoch, reader=reader, num_readers=num_readers, shuffle=shuffle, start=start
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
        num_bad: how many were damaged, before a restart too.
        names: of those met since.
    """

    source: str
    max_bad_fraction: float
    seen: int = 0
    num_bad: int = 0
    names: list[str] = field(default_factory=list)

    # A pass is judged at its end; before that, only by more damage than its first samples may hold.
    GRACE = 100

    def damaged(self, name: str, reason: object) -> DamagedSampleError:
        """Logs a damaged sample and returns the error to skip it by; raises if it is one too many."""
        self.num_bad += 1
        self.names.append(name)
        log.warning("%s: %s is damaged and left out: %s", self.source, name, reason)
        self._check(max(self.seen, self.GRACE))
        return DamagedSampleError(f"{name}: {reason}")

    def finish(self) -> None:
        """Judges the whole pass."""
        if self.num_bad:
            log.warning("%s: %d of %d samples are damaged", self.source, self.num_bad, self.seen)
        self._check(self.seen)

    def _check(self, seen: int) -> None:
        if self.num_bad > self.max_bad_fraction * seen:
            names = ", ".join(self.names[:5]) + (", ..." if self.num_bad > 5 else "")
            raise UnusableSourceError(
                f"{self.source}: {self.num_bad} of {self.seen} samples read are damaged ({names}), "
                f"more than max_bad_fraction={self.max_bad_fraction} allows; each is named with its "
                "reason in the log. Mend them, or raise max_bad_fraction"
            )


class ImageCache:
    """Decoded images by name, up to a number of bytes; left behind when sent to another process."""

    def __init__(self) -> None:
        self.images: dict[str, np.ndarray] = {}
        self.num_bytes = 0

    def load(
        self, name: str, load: Callable[[], np.ndarray], tally: DamageTally, max_bytes: float
    ) -> np.ndarray:
        """The image of this name, decoded by `load` if it is not here; counts one that cannot be.

        It is kept if there is room; what is in stays, as an epoch runs round to it again.
        """
        image = self.images.get(name)
        if image is not None:
            return image
        try:
            image = load()
        except (ValueError, OSError) as error:
            raise tally.damaged(name, error) from None
        self._keep(name, image, max_bytes)
        return image

    def _keep(self, name: str, image: np.ndarray, max_bytes: float) -> None:
        if self.num_bytes + image.nbytes <= max_bytes:
            self.images[name] = image
            self.num_bytes += image.nbytes

    def serve(
        self, name: str, record: ImageRecord, tally: DamageTally, max_bytes: float
    ) -> ImageRecord:
        """The record with its pixels, whole and reduced, from here; what cannot be read is counted."""
        return replace(
            record,
            load=partial(self.load, name, record.load, tally, max_bytes),
            load_reduced=(
                None
                if record.load_reduced is None
                else partial(self._reduced, name, record, tally, max_bytes)
            ),
            damaged=partial(tally.damaged, name),
        )

    def _reduced(
        self, name: str, record: ImageRecord, tally: DamageTally, max_bytes: float, shrink: int
    ) -> tuple[np.ndarray | Image.Image, int]:
        """Each scale is kept by itself: what a sample looks like must not hang on what is in the cache."""
        assert record.load_reduced is not None
        scale = name if shrink == 1 else f"{name} 1/{shrink}"
        image = self.images.get(scale)
        if image is not None:
            return image, 1 if image.shape[:2] == record.size else shrink
        try:
            picture, taken = record.load_reduced(shrink)
        except (ValueError, OSError) as error:
            raise tally.damaged(name, error) from None
        if max_bytes:
            self._keep(scale, np.asarray(picture), max_bytes)
        return picture, taken

    def __reduce__(self) -> tuple[type[ImageCache], tuple[()]]:
        return ImageCache, ()
