"""Fills a cache of image embeddings, so that nothing is encoded twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from sam_train.data.crops import whole_image
from sam_train.data.embedding_cache import EmbeddingCache, thumbnails
from sam_train.data.source import DamagedSampleError, Source, UnusableSourceError
from sam_train.data.transforms import resize_window
from sam_train.models.fingerprint import embedding_shape, encoder_id
from sam_train.models.sam import Sam
from sam_train.structures import ImageRecord


class Precomputed(NamedTuple):
    """What a run did.

    Attributes:
        num_added: embeddings written.
        num_images: embeddings that the cache now holds for this encoder.
        bytes_per_image: of each on disk.
        folder: of this encoder.
    """

    num_added: int
    num_images: int
    bytes_per_image: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Precompute:
    """Encodes the whole images of a source that a cache lacks.

    Attributes:
        dtype: of what is kept, `float16` or `bfloat16`.
        batch_size: images encoded at a time.
        num_workers: processes that decode images; 0 decodes in this one.
        share, num_shares: this process encodes the share-th of so many parts of the source, counted from
            0, where several fill one cache.
    """

    dtype: str = "float16"
    batch_size: int = 8
    num_workers: int = 1
    share: int = 0
    num_shares: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"expected batch_size >= 1 and num_workers >= 0, got {self.batch_size} and "
                f"{self.num_workers}"
            )
        if not 0 <= self.share < self.num_shares:
            raise ValueError(
                f"expected 0 <= share < num_shares, got {self.share} and {self.num_shares}"
            )

    def run(self, model: Sam, source: Source, folder: Path) -> Precomputed:
        """Adds what is missing to the cache at `folder`.

        Args:
            model: in eval mode.
            source: the images.
            folder: of the cache.
        """
        cache = self._cache(model, folder)
        images = _MissingImages(source, cache, model.image_encoder.img_size, self)
        loader: DataLoader = DataLoader(
            images,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_ctrl_c,
        )
        num_added = 0
        with cache.writer() as writer, tqdm(unit=" images", desc="embeddings") as bar:
            for batch in loader:
                if isinstance(batch, UnusableSourceError):
                    raise batch
                for key, thumbnail, embedding in zip(
                    batch.keys, thumbnails(batch.images), _encode(model, batch), strict=True
                ):
                    writer.add(key, thumbnail, embedding)
                num_added += len(batch.keys)
                bar.update(len(batch.keys))
        filled = self._cache(model, folder)
        return Precomputed(num_added, len(filled), filled.bytes_per_image, filled.folder)

    def _cache(self, model: Sam, folder: Path) -> EmbeddingCache:
        return EmbeddingCache(
            folder, encoder=encoder_id(model), shape=embedding_shape(model), dtype=self.dtype
        )


class _Batch(NamedTuple):
    """Model inputs: N keys, (N, 3, S, S) uint8 padded images, (N, 2) their (H, W)."""

    keys: list[str]
    images: Tensor
    input_sizes: Tensor


@torch.inference_mode()
def _encode(model: Sam, batch: _Batch) -> Tensor:
    images, sizes = batch.images.to(model.device), batch.input_sizes.to(model.device)
    return model.encode(images, sizes).image_embeddings


class _MissingImages(IterableDataset):
    """A reader's share of the images that the cache lacks, in batches."""

    def __init__(
        self, source: Source, cache: EmbeddingCache, img_size: int, settings: Precompute
    ) -> None:
        self.source, self.cache = source, cache
        self.img_size, self.settings = img_size, settings

    def __iter__(self) -> Iterator[_Batch | UnusableSourceError]:
        worker = get_worker_info()
        if worker is not None:
            cv2.setNumThreads(0)
        local, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        records = self.source.records(
            epoch=0,
            reader=self.settings.share * num_workers + local,
            num_readers=self.settings.num_shares * num_workers,
            shuffle=False,
        )
        try:
            # Images that are there already are not decoded.
            yield from self._batches(r for r in records if r.key not in self.cache)
        except UnusableSourceError as error:
            # Handed on, not raised: the loader would wrap what a worker raises in a traceback.
            yield error

    def _batches(self, records: Iterator[ImageRecord]) -> Iterator[_Batch]:
        group: list[tuple[str, np.ndarray]] = []
        for record in records:
            view = whole_image(
                record.size, np.zeros((0, 4)), self.img_size, np.random.default_rng(0)
            )
            try:  # at the scale that training would decode it at
                group.append((record.key, resize_window(record, view)))
            except DamagedSampleError:  # counted and logged already
                continue
            if len(group) == self.settings.batch_size:
                yield self._collate(group)
                group = []
        if group:
            yield self._collate(group)

    def _collate(self, group: list[tuple[str, np.ndarray]]) -> _Batch:
        images = torch.zeros(len(group), 3, self.img_size, self.img_size, dtype=torch.uint8)
        for padded, (_, image) in zip(images, group, strict=True):
            height, width = image.shape[:2]
            padded[:, :height, :width] = torch.from_numpy(
                np.ascontiguousarray(image.transpose(2, 0, 1))
            )
        sizes = torch.tensor([image.shape[:2] for _, image in group])
        return _Batch([key for key, _ in group], images, sizes)


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(item: object) -> object:
    return item
