"""Second looks at a random sample of automatic masks (SAM, section 5: 94% of pairs over 0.90 IoU, 97% over 0.75).

An annotator gets an image with its automatic masks and hands back those that are right as they are, others
corrected, and what was missing. What is not handed back was struck out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_engine import mask_shapes
from data_engine.automatic_shards import AutomaticImage, automatic_shards, sample_images
from data_engine.mask_store.store import Store
from data_engine.records import Mask, Review, Task

STAGE = "audit"
IOU_BOUNDS = (0.90, 0.75)
PAPER_SHARES = (0.94, 0.97)
"""Shares of pairs above these bounds in SA-1B's audit."""
NUM_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Who looks at how much again.

    Attributes:
        num_images: drawn among those with automatic masks.
        pair: two annotators who also label images on their own, without the model's masks, to tell how far
            people agree; None: nobody does.
        num_pair_images: that both get, the first of the sample.
        seed: of the draw.
    """

    num_images: int = 500
    pair: Sequence[str] | None = None
    num_pair_images: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.num_pair_images < 0:
            raise ValueError(
                "expected num_images of 1 or more and num_pair_images of 0 or more, got "
                f"{self.num_images} and {self.num_pair_images}"
            )
        if self.pair is not None and len(set(self.pair)) != 2:
            raise ValueError(f"pair is two annotators' names, got {list(self.pair)}")


def audit_tasks(store: Store, root: Path, round_number: int, audit: Audit) -> list[Task]:
    """The tasks of an audit, for `Desk.add_tasks`; the same each time, so adding them again adds none.

    Args:
        store: knows the round's shards.
        root: the engine's folder.
        round_number: whose automatic masks are looked at.
        audit: who gets what.

    Raises:
        ValueError: the round has no automatic mask.
        FileNotFoundError: a shard is gone or damaged: a sample of the others would not be one of all.
    """
    shards = automatic_shards(store, root, round_number)
    if gone := [own.path for own in shards if not own.is_there]:
        raise FileNotFoundError(f"{gone[0]} is gone or damaged: put it back and start again")
    images = sample_images(store, shards, audit.num_images, seed=audit.seed, with_masks=True)
    if not images:
        raise ValueError(
            f"round {round_number} has no automatic mask to look at: data-engine status says which have"
        )
    return [
        *(_second_look(image, round_number, -place) for place, image in enumerate(images)),
        *_pair_tasks([one.image.id for one in images], round_number, audit),
    ]


def _second_look(found: AutomaticImage, round_number: int, priority: float) -> Task:
    """Of falling priority: what is done of an unfinished audit is still a random sample."""
    shown = [
        {
            "id": f"{found.shard.path}#{own.id}",
            "rle": dict(own.rle),
            "predicted_iou": own.predicted_iou,
            "stability_score": own.stability_score,
            "model_id": found.shard.model_id,
        }
        for own in found.annotations
    ]
    return Task(
        id=f"audit-{round_number:03d}-{found.image.id}",
        round=round_number,
        stage="audit",
        image_id=found.image.id,
        priority=priority,
        payload={"masks": shown},
    )


def _pair_tasks(image_ids: Sequence[str], round_number: int, audit: Audit) -> Iterator[Task]:
    """The same images for both, empty: what is shown ready-made would make them agree."""
    for place, image_id in enumerate(image_ids[: audit.num_pair_images] if audit.pair else []):
        for annotator in audit.pair or ():
            yield Task(
                id=f"agreement-{round_number:03d}-{image_id}-{annotator}",
                round=round_number,
                stage="audit",
                image_id=image_id,
                priority=-place,
                reserved_for=annotator,
                payload={"masks": [], "pair": True},
            )


def second_looks(store: Store, round_number: int) -> list[Task]:
    """The audit's tasks that are done, without those of pairs."""
    done = store.tasks(round=round_number, stage=STAGE, state="done")
    return [task for task in done if not task.payload.get("pair")]


def collect_reviews(store: Store, round_number: int) -> int:
    """Makes reviews of what annotators have handed in since, and returns how many there are new."""
    received = {own.task_id: own.received_at for own in store.submissions(round=round_number)}
    # All at hand before the store is written to: a generator would read it meanwhile.
    reviews = [
        review
        for task in second_looks(store, round_number)
        for review in _reviews(task, list(store.masks(task_id=task.id)), received[task.id])
    ]
    return store.add_reviews(reviews)


def _reviews(task: Task, handed_in: Sequence[Mask], received_at: float) -> Iterator[Review]:
    by_shown: dict[str, list[Mask]] = defaultdict(list)
    for mask in handed_in:
        if mask.corrects is not None:
            by_shown[mask.corrects].append(mask)
    for place, shown in enumerate(task.payload["masks"]):
        after, iou = _correction(shown, by_shown[shown["id"]])
        yield Review(
            id=f"{task.id}/{place}",
            round=task.round,
            image_id=task.image_id,
            annotator=str(task.annotator),
            before_id=shown["id"],
            before=shown["rle"],
            after=None if after is None else after.rle,
            iou=iou,
            task_id=task.id,
            seconds=0.0 if after is None else after.seconds,
            created_at=received_at,
        )


def _correction(shown: Mapping[str, Any], candidates: Sequence[Mask]) -> tuple[Mask | None, float]:
    """What a mask became: of several that it was divided into, the one nearest to it."""
    if not candidates:
        return None, 0.0
    found = mask_shapes.ious([shown["rle"]], [own.rle for own in candidates])[0]
    best = int(found.argmax())
    return candidates[best], float(found[best])


class AuditResult(NamedTuple):
    """What an audit says of a round's automatic masks.

    Attributes:
        num_images, num_masks: looked at.
        num_untouched: passed as they were.
        num_struck_out: with an IoU of 0.
        num_added: masks that the annotators found missing.
        mean_iou: of the pairs before and after.
        share_over_90, share_over_75: of the pairs whose IoU is greater than 0.90 and 0.75.
        interval_over_90, interval_over_75: 95% intervals of these (bootstrap over images).
        ious: all, by review.
        annotators: who looked.
    """

    num_images: int
    num_masks: int
    num_untouched: int
    num_struck_out: int
    num_added: int
    mean_iou: float
    share_over_90: float
    share_over_75: float
    interval_over_90: tuple[float, float]
    interval_over_75: tuple[float, float]
    ious: np.ndarray
    annotators: tuple[str, ...]


def audit_result(store: Store, round_number: int, *, seed: int = 0) -> AuditResult | None:
    """Sums the reviews of a round up; None where there is none.

    Args:
        store: with the reviews, see `collect_reviews`.
        round_number: the round.
        seed: of the bootstrap.
    """
    reviews = store.reviews(round=round_number)
    if not reviews:
        return None
    ious = np.array([own.iou for own in reviews])
    by_image: dict[str, list[float]] = defaultdict(list)
    for review in reviews:
        by_image[review.image_id].append(review.iou)
    shares = [float((ious > bound).mean()) for bound in IOU_BOUNDS]
    intervals = [_interval(list(by_image.values()), bound, seed) for bound in IOU_BOUNDS]
    tasks = {review.task_id for review in reviews}
    masks = [own for own in store.masks(round=round_number, source=STAGE) if own.task_id in tasks]
    return AuditResult(
        num_images=len(by_image),
        num_masks=len(reviews),
        num_untouched=sum(own.after is not None and own.iou == 1 for own in reviews),
        num_struck_out=sum(own.after is None for own in reviews),
        num_added=sum(own.corrects is None for own in masks),
        mean_iou=float(ious.mean()),
        share_over_90=shares[0],
        share_over_75=shares[1],
        interval_over_90=intervals[0],
        interval_over_75=intervals[1],
        ious=ious,
        annotators=tuple(sorted({own.annotator for own in reviews})),
    )


def _interval(by_image: Sequence[Sequence[float]], bound: float, seed: int) -> tuple[float, float]:
    """Images are drawn anew, not masks: those of one image stand or fall together."""
    over = np.array([sum(iou > bound for iou in own) for own in by_image])
    num = np.array([len(own) for own in by_image])
    draws = np.random.default_rng(seed).integers(len(num), size=(NUM_RESAMPLES, len(num)))
    shares = over[draws].sum(1) / num[draws].sum(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)
