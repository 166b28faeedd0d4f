"""What annotators did in a round, read in parts: all its clicks and ready-made masks are too many to hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, Text, case, cast, select

from data_engine.mask_store import schema
from data_engine.mask_store.rows import chunks
from data_engine.mask_store.store import Store

TASKS_AT_ONCE = 64


class MadeMask(NamedTuple):
    """What a mask cost.

    Attributes:
        corrects: the ready-made mask that it was made from, by its id in the task; None for one from nothing.
        counts: its run lengths, where it corrects one.
        seconds, num_clicks: see `Mask`.
    """

    corrects: str | None
    counts: str | None
    seconds: float
    num_clicks: int


class DoneTask(NamedTuple):
    """A task with what was handed in for it.

    Attributes:
        annotator: who did it.
        seconds: from opening the image to handing it in.
        shown: run lengths of the ready-made masks, by their ids.
        masks: handed in.
        events: how many there were of each kind.
    """

    annotator: str
    seconds: float
    shown: Mapping[str, str]
    masks: Sequence[MadeMask]
    events: Counter[str]


class _Rle(msgspec.Struct):
    counts: str


class _Shown(msgspec.Struct):
    id: str
    rle: _Rle


class _Payload(msgspec.Struct):
    masks: list[_Shown] = []


class _Event(msgspec.Struct):
    kind: str


def done_tasks(store: Store, round_number: int, stage: str) -> Iterator[DoneTask]:
    """The tasks of a stage that are done, by id; a few of them are in memory at once."""
    task_ids = sorted(labelled_images(store, round_number, stage).values())
    for chunk in chunks(task_ids, TASKS_AT_ONCE):
        with store.read() as connection:
            found = list(_tasks(connection, chunk))
        yield from found


def _tasks(connection: Connection, task_ids: Sequence[str]) -> Iterator[DoneTask]:
    task, submission = schema.tasks.c, schema.submissions.c
    # As text: most of a payload and of an event is not wanted, and costs more to build than to pass over.
    texts = cast(task.payload, Text), cast(submission.events, Text)
    query = (
        select(task.id, submission.annotator, submission.seconds, *texts)
        .join(schema.submissions, submission.task_id == task.id)
        .where(task.id.in_(task_ids))
        .order_by(task.id)
    )
    masks = _masks(connection, task_ids)
    for task_id, annotator, seconds, payload, events in connection.execute(query):
        shown = msgspec.json.decode(payload, type=_Payload).masks
        kinds = msgspec.json.decode(events, type=list[_Event])
        yield DoneTask(
            annotator=annotator,
            seconds=seconds,
            shown={own.id: own.rle.counts for own in shown},
            masks=masks.get(task_id, []),
            events=Counter(own.kind for own in kinds),
        )


def _masks(connection: Connection, task_ids: Sequence[str]) -> dict[str, list[MadeMask]]:
    mask = schema.masks.c
    counts = case((mask.corrects.is_not(None), mask.rle["counts"].as_string()))
    query = select(mask.task_id, mask.corrects, counts, mask.seconds, mask.num_clicks)
    found: dict[str, list[MadeMask]] = {}
    for task_id, *values in connection.execute(
        query.where(mask.task_id.in_(task_ids)).order_by(mask.task_id, mask.id)
    ):
        found.setdefault(task_id, []).append(MadeMask(*values))
    return found


def labelled_images(store: Store, round_number: int, stage: str) -> dict[str, str]:
    """The images of a stage's tasks that are done, by id, with the id of the task."""
    task = schema.tasks.c
    query = select(task.image_id, task.id).where(
        task.round == round_number, task.stage == stage, task.state == "done"
    )
    with store.read() as connection:
        return {str(image_id): str(task_id) for image_id, task_id in connection.execute(query)}
