"""Audited images as a data set, so that the automatic stage's thresholds can be tuned on them by choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_engine.audit import second_looks
from data_engine.images import image_pixels
from data_engine.mask_store.store import Store
from data_engine.records import Image, Task
from sam_train.data.source import DamagedSampleError, sample_seed
from sam_train.evaluation.threshold_tuning import ThresholdTuning, Tuned
from sam_train.models.sam import Sam
from sam_train.structures import Annotation, Cursor, ImageRecord


@dataclass(frozen=True)
class AuditedSource:
    """The images of a round's audit with the masks that annotators left, corrected and added.

    Attributes:
        store: where they are.
        round_number: of the audit.
        seed: of the order, if shuffled.
    """

    store: Store
    round_number: int
    seed: int = 0

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool, start: Cursor = ()
    ) -> Iterator[ImageRecord]:
        """See `Source.records`."""
        tasks = second_looks(self.store, self.round_number)
        if shuffle:
            tasks.sort(key=lambda task: sample_seed(self.seed, epoch, task.image_id))
        own = tasks[reader::num_readers]
        for place in range(start[0] if start else 0, len(own)):
            yield self._record(own[place], (place + 1,), epoch)

    def _record(self, task: Task, cursor: Cursor, epoch: int) -> ImageRecord:
        image = self.store.image(task.image_id)
        masks = self.store.masks(task_id=task.id)
        return ImageRecord(
            key=image.key,
            size=image.size,
            annotations=[
                Annotation(id=number, rle=own.rle, bbox=own.bbox, area=own.area)
                for number, own in enumerate(masks)
            ],
            load=partial(_pixels, image),
            source=f"audit of round {self.round_number}",
            damaged=DamagedSampleError,
            cursor=cursor,
            epoch=epoch,
        )


def _pixels(image: Image) -> np.ndarray:
    try:
        return image_pixels(image)
    except OSError as error:
        raise DamagedSampleError(str(error)) from None


def tune_thresholds(
    store: Store, round_number: int, model: Sam, tuning: ThresholdTuning, out: Path
) -> Tuned:
    """Proposes the automatic stage's thresholds from what an audit left, corrected and added.

    Args:
        store: with the audit.
        round_number: of the audit.
        model: that made the masks, in eval mode.
        tuning: `ThresholdTuning` with the stage's own generator.
        out: gets all that was tried, as JSON.

    Raises:
        ValueError: no image of the round was audited, or the model finds none of the masks.
    """
    if not second_looks(store, round_number):
        raise ValueError(
            f"nothing of round {round_number} was audited yet: data-engine audit hands the tasks out"
        )
    return tuning.run(model, AuditedSource(store, round_number), out)
