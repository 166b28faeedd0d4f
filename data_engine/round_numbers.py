"""What a round made and what it cost, counted from the store and the manifests of its shards."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_engine.automatic_shards import automatic_shards
from data_engine.mask_store.store import Store
from data_engine.mask_store.work import MadeMask, done_tasks
from data_engine.records import Round

AUTOMATIC = "automatic"
SIMULATED = "simulated"
"""How the names of simulated annotators begin."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What annotators did in a round.

    Attributes:
        num_done, num_open: of its tasks.
        num_drawn: masks made from nothing.
        num_corrected: made from ready-made ones.
        num_passed: ready-made ones that were left as they were.
        num_struck_out: ready-made ones that were not handed back.
        mask_seconds, mask_clicks: of each mask drawn or corrected.
        image_seconds: of each task done, all in.
        events: how many there were of each kind.
        annotators: who did them, sorted.
    """

    num_done: int
    num_open: int
    num_drawn: int
    num_corrected: int
    num_passed: int
    num_struck_out: int
    mask_seconds: np.ndarray
    mask_clicks: np.ndarray
    image_seconds: np.ndarray
    events: Mapping[str, int]
    annotators: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RoundNumbers:
    """A round in numbers.

    Attributes:
        round: the row.
        num_images: labelled, those without a mask too.
        num_masks: on them.
        num_ready_made: of these, the model's own that nobody changed.
        work: of people; None in an automatic round.
        rejects: candidates that each filter left out, in the filters' order; empty in a round of people.
        missing: automatic shards that are gone, damaged or of another machine: their rejects are not known.
    """

    round: Round
    num_images: int
    num_masks: int
    num_ready_made: int
    work: Work | None = None
    rejects: Mapping[str, int]
    missing: tuple[str, ...] = ()

    @property
    def masks_per_image(self) -> float | None:
        """None where no image is done."""
        return self.num_masks / self.num_images if self.num_images else None

    @property
    def share_automatic(self) -> float | None:
        """The share of the masks that nobody drew or changed, in [0, 1]."""
        return self.num_ready_made / self.num_masks if self.num_masks else None

    @property
    def seconds_per_mask(self) -> float | None:
        """The mean over masks drawn or corrected, as SAM counts: those passed take none."""
        return None if self.work is None else mean(self.work.mask_seconds)

    @property
    def seconds_per_mask_all_in(self) -> float | None:
        """All that annotators spent on the images, looking and searching too, over all masks."""
        if self.work is None or not self.num_masks:
            return None
        return float(self.work.image_seconds.sum()) / self.num_masks

    @property
    def clicks_per_mask(self) -> float | None:
        """The mean over masks drawn or corrected."""
        return None if self.work is None else mean(self.work.mask_clicks)

    @property
    def is_simulated(self) -> bool:
        """Whether anybody who worked on it was simulated."""
        return self.work is not None and is_simulated(self.work.annotators)


def mean(values: np.ndarray) -> float | None:
    """None of no values."""
    return float(values.mean()) if len(values) else None


def is_simulated(annotators: tuple[str, ...]) -> bool:
    """Whether any of these is simulated."""
    return any(name.startswith(SIMULATED) for name in annotators)


def called(annotators: tuple[str, ...]) -> str:
    """`simulated `, `partly simulated ` or nothing: what is said before a figure of theirs."""
    if not is_simulated(annotators):
        return ""
    return (
        "simulated " if all(is_simulated((name,)) for name in annotators) else "partly simulated "
    )


def round_numbers(store: Store, root: Path, round_: Round) -> RoundNumbers:
    """Counts a round, done or under way."""
    if round_.stage == AUTOMATIC:
        return _automatic(store, root, round_)
    return _of_people(store, round_)


def _automatic(store: Store, root: Path, round_: Round) -> RoundNumbers:
    shards = automatic_shards(store, root, round_.number)
    rejects: Counter[str] = Counter()
    for own in shards:
        if own.manifest is not None:
            rejects.update(own.manifest.rejects)
    num_masks = sum(own.shard.num_masks for own in shards)
    return RoundNumbers(
        round=round_,
        num_images=sum(own.shard.num_images for own in shards),
        num_masks=num_masks,
        num_ready_made=num_masks,
        rejects=dict(rejects),
        missing=tuple(own.shard.path for own in shards if own.manifest is None),
    )


def _of_people(store: Store, round_: Round) -> RoundNumbers:
    made: Counter[str] = Counter()
    events: Counter[str] = Counter()
    annotators, mask_seconds, clicks, image_seconds = set(), array("d"), array("d"), array("d")
    for task in done_tasks(store, round_.number, round_.stage):
        annotators.add(task.annotator)
        image_seconds.append(task.seconds)
        events.update(task.events)
        made["struck out"] += len(task.shown.keys() - {own.corrects for own in task.masks})
        for mask in task.masks:
            kind = _kind(mask, task.shown)
            made[kind] += 1
            if kind != "passed":
                mask_seconds.append(mask.seconds)
                clicks.append(mask.num_clicks)
    waiting = store.count_tasks(round=round_.number, stage=round_.stage)
    work = Work(
        num_done=len(image_seconds),
        num_open=waiting.get("open", 0) + waiting.get("leased", 0),
        num_drawn=made["drawn"],
        num_corrected=made["corrected"],
        num_passed=made["passed"],
        num_struck_out=made["struck out"],
        mask_seconds=np.array(mask_seconds),
        mask_clicks=np.array(clicks),
        image_seconds=np.array(image_seconds),
        events=dict(events),
        annotators=tuple(sorted(annotators)),
    )
    return RoundNumbers(
        round=round_,
        num_images=work.num_done,
        num_masks=work.num_drawn + work.num_corrected + work.num_passed,
        num_ready_made=work.num_passed,
        work=work,
        rejects={},
    )


def _kind(mask: MadeMask, shown: Mapping[str, str]) -> str:
    if mask.corrects is None:
        return "drawn"
    return "passed" if shown.get(mask.corrects) == mask.counts else "corrected"
