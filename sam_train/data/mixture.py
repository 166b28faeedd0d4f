"""Several data sets as one: drawn from by weight in training, gone through in turn in validation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from sam_train.data.source import Source, UnusableSourceError, sample_seed
from sam_train.data.transforms import ToSample
from sam_train.structures import Cursor, ImageRecord, ImageSample


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """A `Source` that draws each image from one of several others, each gone through at its own pace.

    A shuffled epoch has no end. Unshuffled, it is all of the sources, one after the other.

    Attributes:
        sources: by name; records carry that name as their source, and before their key.
        weights: what share of the images comes from each, in any unit; all alike if None. The paper's
            oversampling of human masks by ten (appendix A) is a weight of ten times a set's size.
        seed: of the draws.
    """

    sources: Mapping[str, Source]
    weights: Mapping[str, float] | None = field(default=None, compare=False)
    seed: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("a mixture has at least one source")
        if self.weights is not None:
            if set(self.weights) != set(self.sources):
                raise ValueError(
                    f"expected a weight for each of the sources {', '.join(self.sources)}, got "
                    f"weights for {', '.join(self.weights)}"
                )
            if min(self.weights.values()) < 0 or sum(self.weights.values()) <= 0:
                raise ValueError(f"weights are 0 or more, and one is more, got {self.weights}")

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool, start: Cursor = ()
    ) -> Iterator[ImageRecord]:
        """See `Source.records`."""
        if shuffle:
            return self._drawn(epoch, reader, num_readers, start)
        return self._in_turn(epoch, reader, num_readers, start)

    def _drawn(
        self, epoch: int, reader: int, num_readers: int, start: Cursor
    ) -> Iterator[ImageRecord]:
        num_drawn, *places = start or (0, *((0, ()) for _ in self.sources))
        places = [(int(passes), tuple(cursor)) for passes, cursor in places]
        streams = [
            _endless(name, source, epoch, reader, num_readers, *place)
            for (name, source), place in zip(self.sources.items(), places, strict=True)
        ]
        bounds = self._bounds()
        for number in itertools.count(num_drawn):
            draw = sample_seed(self.seed, epoch, f"mixture/{reader}/{number}") / 2**63
            chosen = next(i for i, bound in enumerate(bounds) if draw < bound)
            record = next(streams[chosen])
            places[chosen] = (record.epoch, record.cursor)
            yield replace(record, cursor=(number + 1, *places))

    def _bounds(self) -> list[float]:
        """Where on [0, 1) the shares of the sources end; the last is infinite, whatever was rounded."""
        weights = [1.0] * len(self.sources) if self.weights is None else list(self._weights())
        total = sum(weights)
        bounds = [share / total for share in itertools.accumulate(weights)]
        last = max(index for index, weight in enumerate(weights) if weight > 0)
        return [bound if i < last else float("inf") for i, bound in enumerate(bounds)]

    def _weights(self) -> Iterator[float]:
        assert self.weights is not None
        return (self.weights[name] for name in self.sources)

    def _in_turn(
        self, epoch: int, reader: int, num_readers: int, start: Cursor
    ) -> Iterator[ImageRecord]:
        first, cursor = start or (0, ())
        for number, (name, source) in enumerate(self.sources.items()):
            if number < first:
                continue
            for record in source.records(
                epoch=epoch,
                reader=reader,
                num_readers=num_readers,
                shuffle=False,
                start=tuple(cursor) if number == first else (),
            ):
                yield replace(named(record, name), cursor=(number, record.cursor))


def _endless(
    name: str,
    source: Source,
    epoch: int,
    reader: int,
    num_readers: int,
    passes: int,
    cursor: Cursor,
) -> Iterator[ImageRecord]:
    """A source's records, pass after pass, from a place on."""
    for number in itertools.count(passes):
        is_empty = not cursor
        for record in source.records(
            epoch=epoch + number, reader=reader, num_readers=num_readers, shuffle=True, start=cursor
        ):
            is_empty = False
            yield replace(named(record, name), epoch=number)
        if is_empty:
            raise UnusableSourceError(
                f"reader {reader + 1} of {num_readers} found no image in {name}: it has fewer images "
                "than there are readers (lower data.num_workers), or none that can be read"
            )
        cursor = ()


def last_epoch(epoch: int, cursor: Cursor) -> int:
    """The furthest epoch that any source was in at a place of a shuffled stream: a mixture's own has no end.

    Args:
        epoch: of the stream.
        cursor: a mixture's, or that of another source, which is in the stream's epoch.
    """
    places = [one for one in cursor[1:] if isinstance(one, tuple | list) and len(one) == 2]
    # Of the cursors of other sources no other element is a pair.
    if not places or len(places) < len(cursor) - 1:
        return epoch
    return max(last_epoch(epoch + int(passes), tuple(place)) for passes, place in places)


def parts_of(source: Source) -> Mapping[str, Source]:
    """The sources of a mixture by name, or the source itself without one."""
    return source.sources if isinstance(source, MixtureSource) else {"": source}


def named(record: ImageRecord, name: str) -> ImageRecord:
    """The record as one of the source of this name, in a mixture where keys may come twice."""
    return replace(record, source=name, key=f"{name}/{record.key}")


@dataclass(frozen=True, kw_only=True)
class BySource:
    """Makes samples of a mixture's records, some of its sources having settings of their own.

    Attributes:
        default: for the others.
        sources: by name.
    """

    default: ToSample
    sources: Mapping[str, ToSample] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, one in self.sources.items():
            if (one.img_size, one.mask_size) != (self.default.img_size, self.default.mask_size):
                raise ValueError(
                    f"expected img_size and mask_size alike for all sources, got {one.img_size} and "
                    f"{one.mask_size} for {name}, {self.default.img_size} and {self.default.mask_size} "
                    "for the others"
                )

    @property
    def img_size(self) -> int:
        """The side of the model input."""
        return self.default.img_size

    @property
    def max_masks(self) -> int:
        """The most masks that a sample of any source has."""
        return max(one.max_masks for one in (self.default, *self.sources.values()))

    def __call__(self, record: ImageRecord, seed: int) -> ImageSample | None:
        """See `ToSample`."""
        return self.sources.get(record.source, self.default)(record, seed)
