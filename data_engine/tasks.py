"""The task desk: hands work to annotators and takes it back, whoever plays them.

An HTTP server wraps it without change: plain records in, plain records out, a `Conflict` is its 409.
Everything here is safe to call from many threads and processes at once, each with its own `Desk`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from data_engine.mask_store.store import Store
from data_engine.records import Receipt, Stage, Submission, Task


class Conflict(ValueError):
    """The task went to somebody else, or on without this annotator; nothing of theirs was stored."""


class Desk:
    """Leases tasks with expiry, to one annotator at a time.

    Args:
        store: where tasks and masks are.
        clock: seconds since 1970; a test's or a simulation's own.
        lease_s: how long an annotator holds a task without renewing it.
    """

    def __init__(
        self, store: Store, *, clock: Callable[[], float] = time.time, lease_s: float = 1800.0
    ) -> None: ...

    def add_tasks(self, tasks: Iterable[Task]) -> int:
        """Adds tasks, all or none; those whose id is known are left as they are.

        Returns:
            How many were new.
        """

    def next_task(self, annotator: str, *, stage: Stage | None = None) -> Task | None:
        """Leases the next task: the annotator's own unfinished one, else that of highest priority.

        An annotator who comes back after a crash thus finds the same task at the same version. Expired
        leases are handed out again.

        Returns:
            The task, or None where there is none to be had now.
        """

    def renew(self, task_id: str, annotator: str) -> Task:
        """Extends a lease by `lease_s` from now on.

        Raises:
            Conflict: the annotator does not hold the task any more.
        """

    def release(self, task_id: str, annotator: str) -> None:
        """Gives a task back undone; nothing happens where the annotator does not hold it."""

    def withdraw(self, task_ids: Iterable[str]) -> int:
        """Takes open and leased tasks off the desk; returns how many were."""

    def submit(self, submission: Submission, annotator: str) -> Receipt:
        """Stores all masks of a submission, or none.

        The same submission again gives the same receipt. One that comes after its lease expired is
        taken where nobody else got the task meanwhile.

        Raises:
            Conflict: another annotator holds or did the task, it was withdrawn, or it was handed out
                anew since; nothing is merged.
            ValueError: a mask is damaged, empty or not of the image's size.
        """
