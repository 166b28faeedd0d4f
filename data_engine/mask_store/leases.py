"""The SQL of the task desk: who holds which task. `tasks.py` decides, inside one `Store.write`.

PostgreSQL locks the rows that are looked at here until the transaction ends; SQLite lets one process
write at a time and ignores `FOR UPDATE`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, select, update

from data_engine.mask_store.rows import from_row, insert_new, to_row
from data_engine.mask_store.schema import images, masks, submissions, tasks
from data_engine.records import Image, Mask, StoredSubmission, Task


def add_tasks(connection: Connection, new: Iterable[Task]) -> int:
    """Adds tasks whose ids are not known; returns how many."""
    return insert_new(connection, tasks, map(to_row, new))


def task_of(connection: Connection, task_id: str) -> Task | None:
    """A task, which nobody else changes until the transaction ends."""
    return _first(connection, select(tasks).where(tasks.c.id == task_id).with_for_update())


def image_of(connection: Connection, task_id: str) -> Image | None:
    """The image of a task."""
    of_task = tasks.c.image_id == images.c.id
    query = select(images).join(tasks, of_task).where(tasks.c.id == task_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else from_row(Image, row)


def held_by(connection: Connection, annotator: str, stage: str | None) -> Task | None:
    """The task that an annotator has taken and not finished, whether the lease is over or not."""
    mine = (tasks.c.state == "leased") & (tasks.c.annotator == annotator)
    return _first(connection, _queue(mine, stage).with_for_update())


def next_free(connection: Connection, annotator: str, now: float, stage: str | None) -> Task | None:
    """The first task in the queue that is open or whose lease is over, passing over locked ones."""
    theirs = tasks.c.reserved_for.is_(None) | (tasks.c.reserved_for == annotator)
    is_over = (tasks.c.state == "leased") & (tasks.c.lease_expires_at <= now)
    # Two questions: each goes down an index, where one with an "or" would sort all open tasks.
    found = [
        task
        for free in (tasks.c.state == "open", is_over)
        if (
            task := _first(
                connection, _queue(free & theirs, stage).with_for_update(skip_locked=True)
            )
        )
    ]
    return min(found, key=lambda task: (-task.priority, task.id), default=None)


def change(connection: Connection, task: Task, **values: Any) -> Task:
    """Sets fields of a task; returns it as it now is."""
    connection.execute(update(tasks).where(tasks.c.id == task.id).values(**values))
    return replace(task, **values)


def withdraw(connection: Connection, task_ids: list[str]) -> int:
    """Takes tasks that are not done off the desk; returns how many."""
    chosen = tasks.c.id.in_(task_ids) & tasks.c.state.in_(("open", "leased"))
    values = {"state": "withdrawn", "annotator": None, "lease_expires_at": None}
    return connection.execute(update(tasks).where(chosen).values(**values)).rowcount


def submission_of(connection: Connection, submission_id: str) -> StoredSubmission | None:
    """What was handed in under an id."""
    query = select(submissions).where(submissions.c.submission_id == submission_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else from_row(StoredSubmission, row)


def add_submission(
    connection: Connection, record: StoredSubmission, its_masks: Iterable[Mask]
) -> None:
    """Stores what was handed in and its masks."""
    connection.execute(submissions.insert(), to_row(record))
    if rows := list(map(to_row, its_masks)):
        connection.execute(masks.insert(), rows)


def _queue(condition: ColumnElement[bool], stage: str | None) -> Select[Any]:
    if stage is not None:
        condition = condition & (tasks.c.stage == stage)
    return select(tasks).where(condition).order_by(tasks.c.priority.desc(), tasks.c.id).limit(1)


def _first(connection: Connection, query: Select[Any]) -> Task | None:
    row = connection.execute(query).first()
    return None if row is None else from_row(Task, row)
