"""Training batches without end, made by several readers, each with the place where it then was."""

from __future__ import annotations

import gc
import itertools
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sam_train.data.collate import Parcel, pack
from sam_train.data.mixture import BySource
from sam_train.data.source import DamagedSampleError, Source, UnusableSourceError, sample_seed
from sam_train.data.transforms import ToSample
from sam_train.structures import Cursor, ImageBatch, ImageSample

MOST_WITHOUT_MASKS = 10_000
"""Images in a row without a mask to train on after which a reader gives up: a mixture has no end."""


class Position(NamedTuple):
    """How far one reader has come: in which epoch, and where in it (see `Source.records`)."""

    epoch: int = 0
    cursor: Cursor = ()


@dataclass(kw_only=True)
class TrainStream(IterableDataset):
    """Packed batches without end, epoch after epoch, each reader at its own pace.

    Attributes:
        source: the records.
        transform: makes samples of them.
        batch_size, max_masks_per_batch: as in `pack`.
        seed: of every draw, together with the epoch and the sample's key.
        rank, world_size: this process among all.
        starts: where each of this process's readers goes on; from the beginning if empty.
        first_reader: which of them gives the first batch, as the loader asks its workers in turn.
    """

    source: Source
    transform: ToSample | BySource
    batch_size: int
    max_masks_per_batch: int | None
    seed: int
    rank: int = 0
    world_size: int = 1
    starts: Sequence[Position] = ()
    first_reader: int = 0

    def __iter__(self) -> Iterator[Delivery | UnusableSourceError]:
        worker = get_worker_info()
        if worker is not None:
            cv2.setNumThreads(0)
        num_workers = 1 if worker is None else worker.num_workers
        local = (self.first_reader + (0 if worker is None else worker.id)) % num_workers
        try:
            yield from self._batches(local, num_workers)
        except UnusableSourceError as error:
            # Handed on, not raised: the loader would wrap what a worker raises in a traceback.
            yield error

    def _batches(self, local: int, num_workers: int) -> Iterator[Delivery]:
        positions: deque[Position] = deque()

        def samples() -> Iterator[ImageSample]:
            for position, sample in self._samples(local, num_workers):
                positions.append(position)
                yield sample

        for group in pack(
            samples(), batch_size=self.batch_size, max_masks=self.max_masks_per_batch
        ):
            position = [positions.popleft() for _ in group][-1]
            yield Delivery(Parcel.of(group, self.transform.img_size), local, position)

    def _samples(self, local: int, num_workers: int) -> Iterator[tuple[Position, ImageSample]]:
        start = self.starts[local] if self.starts else Position()
        reader, num_readers = self.rank * num_workers + local, self.world_size * num_workers
        for epoch in itertools.count(start.epoch):
            cursor = start.cursor if epoch == start.epoch else ()
            is_empty, num_without = not cursor, 0
            records = self.source.records(
                epoch=epoch, reader=reader, num_readers=num_readers, shuffle=True, start=cursor
            )
            for record in records:
                seed = sample_seed(self.seed, epoch + record.epoch, record.key)
                try:
                    sample = self.transform(record, seed)
                except DamagedSampleError:
                    continue
                if sample is not None:
                    is_empty, num_without = False, 0
                    yield Position(epoch, record.cursor), sample
                elif (num_without := num_without + 1) >= MOST_WITHOUT_MASKS:
                    break
            if is_empty or num_without >= MOST_WITHOUT_MASKS:
                raise UnusableSourceError(
                    f"reader {reader + 1} of {num_readers} found no image with a mask to train on: "
                    "there are fewer images than readers (lower data.num_workers), or every mask is "
                    "outside the limits of data.train_transform"
                )


class Delivery(NamedTuple):
    """A batch, the reader of this process that made it, and how far it then was."""

    parcel: Parcel
    reader: int
    position: Position


@dataclass
class TrainLoader:
    """The batches of a `TrainStream`, noting down the positions that belong to them.

    Each iteration begins where the last batch that was used ended: Lightning iterates anew after every
    `trainer.limit_train_batches`, and drops what it had fetched ahead.

    Attributes:
        stream: makes the stream, from there on.
        num_workers: processes that read it; 0 reads in this one.
        delivered: the reader and position of each batch fetched and not yet used.
    """

    stream: Callable[[], TrainStream]
    num_workers: int
    delivered: deque[tuple[int, Position]] = field(default_factory=deque)

    def __iter__(self) -> Iterator[ImageBatch]:
        self.delivered.clear()
        loader: DataLoader = DataLoader(
            self.stream(),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_reader,
            pin_memory=torch.cuda.is_available(),
        )
        return self._batches(loader)

    def _batches(self, loader: DataLoader) -> Iterator[ImageBatch]:
        for delivery in loader:
            if isinstance(delivery, UnusableSourceError):
                raise delivery
            self.delivered.append((delivery.reader, delivery.position))
            yield delivery.parcel.unpacked()


def _start_reader(worker: int) -> None:
    """Prepares a reader's process."""
    # A terminal sends Ctrl-C to the readers too, while the step under way may still wait for a batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What came with the fork is not garbage: to go through it again and again takes time, and makes
    # copies of the pages it lies on.
    gc.freeze()


def _as_it_is(item: Any) -> Any:
    return item
