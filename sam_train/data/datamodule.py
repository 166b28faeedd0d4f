"""Streams of training batches and of validation images, for Lightning."""

from __future__ import annotations

import itertools
import logging
import math
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import cv2
import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sam_train.data.collate import collate, pack
from sam_train.data.mixture import BySource, MixtureSource, named, parts_of
from sam_train.data.source import (
    DamagedSampleError,
    HeldOut,
    Source,
    UnusableSourceError,
    readable,
    sample_seed,
)
from sam_train.data.transforms import ToSample
from sam_train.structures import Cursor, ImageBatch, ImageRecord, ImageSample

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.1
"""Of the training images, validated on instead where no others are given."""

PATHS = frozenset(
    f"{part}{name}" for part in ("", "val_") for name in "path images masks annotations".split()
)
"""What recipes ask the user for."""


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
            yield Delivery(collate(group, self.transform.img_size), local, position)

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

    batch: ImageBatch
    reader: int
    position: Position


@dataclass
class TrainLoader:
    """The batches of a data module's `TrainStream`, noting down the positions that belong to them.

    Each iteration begins where the last batch that was used ended: Lightning iterates anew after every
    `trainer.limit_train_batches`, and drops what it had fetched ahead.
    """

    make: Callable[[], DataLoader]
    delivered: deque[tuple[int, Position]] = field(default_factory=deque)

    def __iter__(self) -> Iterator[ImageBatch]:
        self.delivered.clear()
        return self._batches(self.make())

    def _batches(self, loader: DataLoader) -> Iterator[ImageBatch]:
        for delivery in loader:
            if isinstance(delivery, UnusableSourceError):
                raise delivery
            self.delivered.append((delivery.reader, delivery.position))
            yield delivery.batch


class SamDataModule(lightning.LightningDataModule):
    """Hands training packed batches without end, and validation whole images.

    Attributes:
        train: what to train on.
        val: what to validate on; if it equals `train`, a tenth of the images is held out for it.
    """

    def __init__(
        self,
        *,
        train: Source,
        val: Source,
        train_transform: ToSample | BySource,
        batch_size: int,
        max_masks_per_batch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        val_seed: int = 0,
        max_val_masks: int | None = 256,
        max_val_masks_per_image: int = 8,
    ) -> None:
        """Takes the sources and what is to be made of them.

        Args:
            train: see above.
            val: see above.
            train_transform: makes a training sample of a record.
            batch_size: images per batch and process.
            max_masks_per_batch: closes a batch with fewer images where they hold many masks.
            num_workers: processes that read, per training process; 0 reads in the training process.
            seed: of crops, flips, colours and the choice of masks, together with epoch and key.
            val_seed: of the choice of masks to validate on.
            max_val_masks: how many those are; None takes all.
            max_val_masks_per_image: of one image, so that the choice spans enough images.
        """
        super().__init__()
        if max_masks_per_batch is not None and max_masks_per_batch < train_transform.max_masks:
            raise ValueError(
                f"max_masks_per_batch={max_masks_per_batch} cannot hold the "
                f"max_masks={train_transform.max_masks} that one image may have"
            )
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"expected batch_size >= 1 and num_workers >= 0, got {batch_size}, {num_workers}"
            )
        self.train, self.val = train, val
        self.train_transform = train_transform
        self.batch_size, self.max_masks_per_batch = batch_size, max_masks_per_batch
        self.num_workers = num_workers
        self.seed, self.val_seed = seed, val_seed
        self.max_val_masks, self.max_val_masks_per_image = max_val_masks, max_val_masks_per_image
        self._positions = [Position()] * max(1, num_workers)
        self._num_batches = 0
        self._train_loader: TrainLoader | None = None
        self._val_subset: list[ImageRecord] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads one record of each source, so that what is missing is said here and not by a worker."""
        self.train, self.val = hold_out(self.train, self.val)
        for role, source in (("train", self.train), ("val", self.val)):
            records = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
            if next(records, None) is None:
                if isinstance(source, HeldOut):
                    raise UnusableSourceError(
                        f"of so few images none is held out for data.{role}: name others with "
                        "data.val_path=PATH (for COCO and folders data.val_images=DIR ...)"
                    )
                raise UnusableSourceError(f"data.{role} holds no image: {source}")

    def train_dataloader(self) -> TrainLoader:
        """Batches without end, beginning where the last one handed to training was."""
        self._train_loader = TrainLoader(self._stream_loader)
        return self._train_loader

    def _stream_loader(self) -> DataLoader:
        stream = TrainStream(
            source=self.train,
            transform=self.train_transform,
            batch_size=self.batch_size,
            max_masks_per_batch=self.max_masks_per_batch,
            seed=self.seed,
            rank=self._rank(),
            world_size=self._world_size(),
            starts=tuple(self._positions),
            first_reader=self._num_batches % len(self._positions),
        )
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_ctrl_c,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> ValRecords:
        """This process's share of the validation images, the same each time."""
        return ValRecords(self)

    def val_subset(self) -> list[ImageRecord]:
        """The images and masks of validation while training, of all processes together."""
        assert self.max_val_masks is not None
        if self._val_subset is None:
            parts = parts_of(self.val)
            self._val_subset = [
                named(record, name) if name else record
                for name, source in parts.items()
                for record in choose_masks(
                    source,
                    max_masks=math.ceil(self.max_val_masks / len(parts)),
                    max_masks_per_image=self.max_val_masks_per_image,
                    seed=self.val_seed,
                )
            ]
        return self._val_subset

    @property
    def val_sources(self) -> tuple[str, ...]:
        """The names of the data sets validated on, where there are several."""
        return tuple(filter(None, parts_of(self.val)))

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves training batches; a record stays as it is. Also where a batch counts as used."""
        if isinstance(batch, ImageRecord):
            return batch
        # Lightning fetches a batch ahead, so positions count from here and not from the loader.
        if self._train_loader is not None and self._train_loader.delivered:
            reader, position = self._train_loader.delivered.popleft()
            self._positions[reader] = position
            self._num_batches += 1
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """How far all readers of all processes have read, in plain types; every process calls this."""
        return {
            "num_batches": self._num_batches,
            "readers": [tuple(position) for position in self._positions_of_all()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there; with another number of readers, from the epoch after."""
        readers, num_mine = state_dict["readers"], len(self._positions)
        if len(readers) == self._world_size() * num_mine:
            first = self._rank() * num_mine
            self._positions = [Position(*one) for one in readers[first : first + num_mine]]
            self._num_batches = state_dict["num_batches"]
        else:
            epoch = max(epoch for epoch, _ in readers) + 1
            log.warning(
                "the number of readers has changed: going on at the start of epoch %d", epoch
            )
            self._positions = [Position(epoch)] * num_mine
            self._num_batches = 0

    def _positions_of_all(self) -> list[Position]:
        if self._world_size() == 1 or not torch.distributed.is_initialized():
            return self._positions
        of_all: list[Any] = [None] * self._world_size()
        torch.distributed.all_gather_object(of_all, self._positions)
        return [position for positions in of_all for position in positions]

    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1


@dataclass
class ValRecords:
    """One process's share of a data module's validation images, with their pixels decoded."""

    data: SamDataModule

    def __iter__(self) -> Iterator[ImageRecord]:
        rank, world_size = self.data._rank(), self.data._world_size()
        if self.data.max_val_masks is None:
            return readable(
                self.data.val.records(epoch=0, reader=rank, num_readers=world_size, shuffle=False)
            )
        # Copies, so that the decoded pixels are not kept.
        subset = self.data.val_subset()[rank::world_size]
        return readable(replace(record) for record in subset)


def choose_masks(
    source: Source, *, max_masks: int, max_masks_per_image: int, seed: int
) -> list[ImageRecord]:
    """A fixed choice of up to `max_masks` masks, spread over the images of a source.

    The same on every process, and no more of the source is read than is needed.
    """
    chosen: list[ImageRecord] = []
    missing = max_masks
    for record in readable(source.records(epoch=0, reader=0, num_readers=1, shuffle=True)):
        rng = np.random.default_rng(sample_seed(seed, 0, record.key))
        count = min(max_masks_per_image, missing)
        indices = np.sort(rng.permutation(len(record.annotations))[:count])
        if indices.size:
            annotations = tuple(record.annotations[index] for index in indices.tolist())
            chosen.append(replace(record, annotations=annotations))
            missing -= len(annotations)
        if missing == 0:
            break
    if not chosen:
        raise UnusableSourceError(f"there is no mask to validate on in {source}")
    return chosen


def hold_out(train: Source, val: Source, share: float = HELD_OUT_SHARE) -> tuple[Source, Source]:
    """The sources as they are, or, where they are the same images, each with its share of them.

    In a mixture that goes for each of its sources.
    """
    if isinstance(train, MixtureSource) and isinstance(val, MixtureSource):
        both = {
            name: hold_out(train.sources[name], source, share)
            for name, source in val.sources.items()
            if name in train.sources
        }
        rest, held = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
        return (
            replace(train, sources={**train.sources, **rest}),
            replace(val, sources={**val.sources, **held}),
        )
    if train != val:
        return train, val
    log.warning(
        "no other images%s are given to validate on: %.0f%% are held out of training",
        f" of {name}" if (name := getattr(train, "name", "")) else "",
        100 * share,
    )
    return (
        HeldOut(source=train, share=share, keep="rest"),
        HeldOut(source=train, share=share, keep="held_out"),
    )


def from_paths(**settings: Any) -> SamDataModule:
    """A data module whose sources take the user's paths by interpolation, and so were built already.

    Args:
        settings: the arguments of `SamDataModule`, and those of `PATHS` that the recipe has.
    """
    return SamDataModule(**{name: one for name, one in settings.items() if name not in PATHS})


def mixture(
    *,
    sets: Mapping[str, object],
    weights: Mapping[str, float] | None,
    transforms: Mapping[str, Mapping[str, Any]],
    train_transform: ToSample,
    **settings: Any,
) -> SamDataModule:
    """A data module over the mixture of several data recipes.

    Args:
        sets: the recipes by name; the sources in `settings` were built from them already.
        weights: likewise.
        transforms: by set, what its samples are made with, where not with `train_transform`'s.
        train_transform: see `SamDataModule`.
        settings: its other arguments.
    """
    if unknown := transforms.keys() - sets.keys():
        raise ValueError(
            f"data.transforms names {', '.join(sorted(unknown))}, the sets are {', '.join(sets)}"
        )
    own = {name: replace(train_transform, **changes) for name, changes in transforms.items()}
    transform = BySource(default=train_transform, sources=own)
    return SamDataModule(train_transform=transform, **settings)


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends it to the readers too, while the step under way may still wait for a batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item
