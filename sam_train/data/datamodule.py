"""Streams of training batches and of validation images, for Lightning."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import lightning
import torch

from sam_train.data.fingerprint import fingerprint
from sam_train.data.mixture import BySource, last_epoch, named, parts_of
from sam_train.data.shard_split import warn_of_rereading
from sam_train.data.source import HeldOut, Source, UnusableSourceError, readable
from sam_train.data.train_stream import Position, TrainLoader, TrainStream
from sam_train.data.transforms import ToSample
from sam_train.data.val_choice import choose_masks, hold_out
from sam_train.structures import ImageRecord

log = logging.getLogger(__name__)

PATHS = frozenset(
    f"{part}{name}" for part in ("", "val_") for name in "path images masks annotations".split()
)
"""What recipes ask the user for."""


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
        self._files  # noqa: B018  looked at now
        if self._rank() == 0:
            warn_of_rereading(self.train, self._world_size() * len(self._positions))
        self._train_loader = TrainLoader(self._stream, self.num_workers)
        return self._train_loader

    def _stream(self) -> TrainStream:
        return TrainStream(
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
            "files": self._files,
            "num_batches": self._num_batches,
            "readers": [tuple(position) for position in self._positions_of_all()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there; with another number of readers or other data, from the epoch after."""
        readers, num_mine = state_dict["readers"], len(self._positions)
        changes = []
        if len(readers) != self._world_size() * num_mine:
            changes.append("the number of readers has changed")
        if state_dict.get("files", self._files) != self._files:
            changes.append("the data's files are not those of before, in names or sizes")
        if changes:
            epoch = max(last_epoch(epoch, cursor) for epoch, cursor in readers) + 1
            log.warning("%s: going on at the start of epoch %d", " and ".join(changes), epoch)
            self._positions = [Position(epoch)] * num_mine
            self._num_batches = 0
            return
        first = self._rank() * num_mine
        self._positions = [Position(*one) for one in readers[first : first + num_mine]]
        self._num_batches = state_dict["num_batches"]

    @cached_property
    def _files(self) -> str:
        """As the training began: a file that is lost meanwhile must not keep checkpoints from being written."""
        return fingerprint(self.train)

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
