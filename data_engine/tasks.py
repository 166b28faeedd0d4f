"""The task desk: hands work to annotators and takes it back, whoever plays them.

An HTTP server wraps it without change: plain records in, plain records out, and a `Conflict` is its 409.
It is safe to call from many threads and processes at once; processes make their own store and desk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
from sqlalchemy.exc import IntegrityError

from data_engine.mask_store import leases
from data_engine.mask_store.store import Store
from data_engine.records import (
    Image,
    Mask,
    Receipt,
    Stage,
    StoredSubmission,
    Submission,
    Task,
)
from sam_train.ops import rle


class Conflict(ValueError):
    """The task went to somebody else, or on without this annotator; nothing of theirs was stored."""


class Desk:
    """Leases tasks with expiry, to one annotator at a time.

    An annotator is a name; two people, tabs or processes that work at once have two.

    Args:
        store: where tasks and masks are.
        clock: seconds since 1970; a test's or a simulation's own.
        lease_s: how long an annotator holds a task without renewing it.
        labels: the classes of the project, of which a mask may have one; None: any that it is given.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        lease_s: float = 1800.0,
        labels: Sequence[str] | None = None,
    ) -> None:
        if not lease_s > 0:
            raise ValueError(f"lease_s is a number of seconds above 0, got {lease_s}")
        self.store = store
        self.clock = clock
        self.lease_s = lease_s
        self.labels = labels

    def add_tasks(self, tasks: Iterable[Task]) -> int:
        """Adds tasks, all or none; those whose id is known are left as they are.

        Returns:
            How many were new.

        Raises:
            ValueError: an image is not registered.
        """
        now = self.clock()
        try:
            with self.store.write() as connection:
                return leases.add_tasks(
                    connection, (replace(task, created_at=now) for task in tasks)
                )
        except IntegrityError as error:
            raise ValueError(
                "no task was added: an image of theirs is not registered, or was taken down"
            ) from error

    def next_task(self, annotator: str, *, stage: Stage | None = None) -> Task | None:
        """Leases the next task: the annotator's own unfinished one, else that of highest priority.

        An annotator who comes back after a crash thus finds the same task at the same version. Expired
        leases are handed out again.

        Args:
            stage: hands out tasks of this stage only.

        Returns:
            The task, or None where there is none to be had now.
        """
        _check_name(annotator)
        now = self.clock()
        with self.store.write() as connection:
            if task := leases.held_by(connection, annotator, stage):
                return leases.change(connection, task, lease_expires_at=now + self.lease_s)
            if task := leases.next_free(connection, annotator, now, stage):
                return leases.change(
                    connection,
                    task,
                    state="leased",
                    annotator=annotator,
                    lease_expires_at=now + self.lease_s,
                    version=task.version + 1,
                )
        return None

    def renew(self, task_id: str, annotator: str) -> Task:
        """Extends a lease by `lease_s` from now on, also one that is over if nobody else got the task.

        Raises:
            Conflict: the annotator does not hold the task any more.
        """
        with self.store.write() as connection:
            task = _held(leases.task_of(connection, task_id), task_id, annotator)
            return leases.change(connection, task, lease_expires_at=self.clock() + self.lease_s)

    def release(self, task_id: str, annotator: str) -> None:
        """Gives a task back undone; nothing happens where the annotator does not hold it."""
        with self.store.write() as connection:
            task = leases.task_of(connection, task_id)
            if task and task.state == "leased" and task.annotator == annotator:
                leases.change(connection, task, state="open", annotator=None, lease_expires_at=None)

    def withdraw(self, task_ids: Iterable[str]) -> int:
        """Takes tasks that are not done off the desk; returns how many."""
        with self.store.write() as connection:
            return leases.withdraw(connection, list(task_ids))

    def submit(self, submission: Submission, annotator: str) -> Receipt:
        """Stores all masks of a submission, or none.

        The same submission again gives the same receipt. One that comes after its lease is over is
        taken where nobody else got the task meanwhile.

        Raises:
            Conflict: another annotator holds or did the task, it was withdrawn, or it was handed out
                anew since; nothing is merged.
            ValueError: a mask is damaged, empty, not of the image's size or of no class of the project, or
                an event is of none.
        """
        _check_name(annotator)
        with self.store.read() as connection:
            image = leases.image_of(connection, submission.task_id)
        # Before the lock is taken: others wait for it.
        drawn = [] if image is None else _measured(submission, image)
        try:
            return self._store(submission, annotator, drawn)
        except IntegrityError as error:  # for two tasks in the same instant
            raise Conflict(f"submission_id {submission.submission_id} is taken") from error

    def _store(self, submission: Submission, annotator: str, drawn: list[_Measured]) -> Receipt:
        now = self.clock()
        digest = hashlib.sha256(msgspec.json.encode(submission)).hexdigest()
        with self.store.write() as connection:
            task = leases.task_of(connection, submission.task_id)
            known = leases.submission_of(connection, submission.submission_id)
            if known is not None:
                return _same(known, annotator, digest).receipt
            _check_labels(submission, self.labels)
            task = _held(task, submission.task_id, annotator)
            if task.version != submission.version:
                raise Conflict(
                    f"task {task.id} was handed out anew since: it is at version {task.version}, the "
                    f"submission is of version {submission.version}; ask for the task again"
                )
            masks = [
                _mask(task, submission, place, drawn[place], now) for place in range(len(drawn))
            ]
            record = StoredSubmission(
                submission_id=submission.submission_id,
                task_id=task.id,
                version=task.version,
                annotator=annotator,
                digest=digest,
                mask_ids=tuple(mask.id for mask in masks),
                events=tuple(submission.events),
                seconds=submission.seconds,
                received_at=now,
            )
            leases.change(connection, task, state="done", lease_expires_at=None)
            leases.add_submission(connection, record, masks)
            return record.receipt


class _Measured(NamedTuple):
    """A mask's compressed RLE, its (x, y, w, h) and its pixels."""

    rle: dict[str, Any]
    bbox: tuple[float, float, float, float]
    area: int


def _check_labels(submission: Submission, labels: Sequence[str] | None) -> None:
    for place, mask in enumerate(submission.masks):
        if labels is not None and mask.label is not None and mask.label not in labels:
            raise ValueError(
                f"mask {place} of {submission.submission_id}: its label is {mask.label!r}; this project has "
                f"{', '.join(labels) or 'none'}"
            )


def _measured(submission: Submission, image: Image) -> list[_Measured]:
    found = []
    for place, mask in enumerate(submission.masks):
        try:
            if rle.size_of(mask.rle) != image.size:
                raise ValueError(f"it is {rle.size_of(mask.rle)} pixels, its image {image.size}")
            measured = _Measured(rle.compress(mask.rle), rle.bbox(mask.rle), rle.area(mask.rle))
            if not measured.area:
                raise ValueError("it is empty")
        except ValueError as error:
            raise ValueError(f"mask {place} of {submission.submission_id}: {error}") from None
        found.append(measured)
    for event in submission.events:
        if event.mask_index is not None and not 0 <= event.mask_index < len(found):
            raise ValueError(
                f"an event of {submission.submission_id} is for mask {event.mask_index} of {len(found)}"
            )
    return found


def _mask(task: Task, submission: Submission, place: int, drawn: _Measured, now: float) -> Mask:
    """The mask as it is stored: what is measured comes from its pixels, the rest as it was handed in."""
    given = vars(submission.masks[place]) | drawn._asdict()
    return Mask(
        id=f"{submission.submission_id}/{place}",
        image_id=task.image_id,
        task_id=task.id,
        round=task.round,
        source=task.stage,
        author=str(task.annotator),
        created_at=now,
        **given,
    )


def _held(task: Task | None, task_id: str, annotator: str) -> Task:
    """The task, if the annotator holds it; else a `Conflict`."""
    if task is None:
        raise Conflict(
            f"task {task_id} is not on the desk: its image was taken down, or it never was"
        )
    if task.state == "leased" and task.annotator == annotator:
        return task
    reasons = {
        "open": f"is not {annotator}'s: it was given back, or never handed out; ask for a task",
        "leased": f"went to {task.annotator} when the lease of {annotator} was over",
        "done": f"is done, by {task.annotator}",
        "withdrawn": "was withdrawn",
    }
    raise Conflict(f"task {task_id} {reasons[task.state]}; nothing was stored")


def _same(known: StoredSubmission, annotator: str, digest: str) -> StoredSubmission:
    """What is known under a submission's id, if it is that one sent again; else a `Conflict`."""
    if (known.annotator, known.digest) != (annotator, digest):
        raise Conflict(
            f"submission_id {known.submission_id} is that of another submission, by {known.annotator} "
            f"for task {known.task_id}; nothing was stored"
        )
    return known


def _check_name(annotator: str) -> None:
    if not annotator.strip():
        raise ValueError("an annotator has a name, got an empty one")
