"""The work of a round is read back as it was handed in, and never held whole."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_engine.mask_sample import sampled_images
from data_engine.mask_store.store import open_store
from data_engine.mask_store.work import TASKS_AT_ONCE, done_tasks, labelled_images
from data_engine.records import DrawnMask, Event, Image, Round, Submission, Task
from data_engine.round_numbers import round_numbers
from data_engine.tasks import Desk
from sam_train.ops import rle


def square(width: int) -> dict[str, object]:
    """The first columns of an image of 8 x 6 px (width x height)."""
    mask = np.zeros((6, 8), bool)
    mask[:, :width] = True
    return rle.encode(mask)


def hand_in(desk: Desk, masks: list[DrawnMask], events: tuple[Event, ...] = ()) -> str:
    task = desk.next_task("anna")
    assert task is not None
    desk.submit(
        Submission(
            submission_id=f"s-{task.id}",
            task_id=task.id,
            version=task.version,
            masks=tuple(masks),
            events=events,
            seconds=9.0,
        ),
        "anna",
    )
    return task.id


def test_what_was_handed_in_comes_back_task_by_task(desk: Desk) -> None:
    shown = {"masks": [{"id": "000", "rle": square(3)}, {"id": "001", "rle": square(5)}]}
    desk.add_tasks(
        Task(id=f"t{name}", round=1, stage="semi_automatic", image_id=name, payload=payload)
        for name, payload in (("a", shown), ("b", {}), ("c", {}))
    )
    clicks = tuple(Event(kind="click", offset_s=own, mask_index=0) for own in (1.0, 2.0))
    kept, drawn = DrawnMask(rle=square(3), corrects="000"), DrawnMask(rle=square(2), num_clicks=2)
    hand_in(desk, [kept, drawn], (*clicks, Event(kind="accept", offset_s=3.0)))
    hand_in(desk, [])

    first, second = done_tasks(desk.store, 1, "semi_automatic")

    assert (first.annotator, first.seconds) == ("anna", 9.0)
    assert first.shown == {own["id"]: own["rle"]["counts"] for own in shown["masks"]}  # type: ignore[index]
    found = [(own.corrects, own.counts, own.num_clicks) for own in first.masks]
    assert found == [("000", square(3)["counts"], 0), (None, None, 2)]
    assert first.events == {"click": 2, "accept": 1}
    assert not second.masks and not second.shown and not second.events
    assert labelled_images(desk.store, 1, "semi_automatic") == {"a": "ta", "b": "tb"}
    assert list(done_tasks(desk.store, 1, "assisted")) == []


def test_a_round_is_counted_without_holding_it(tmp_path: Path, image: Callable[..., Image]) -> None:
    store = open_store(tmp_path / "engine.sqlite", create=True)
    num_tasks = 3 * TASKS_AT_ONCE + 1
    names = [f"{number:04d}" for number in range(num_tasks)]
    store.add_images(image(name) for name in names)
    desk = Desk(store)
    desk.add_tasks(Task(id=f"t{name}", round=1, stage="assisted", image_id=name) for name in names)
    stroke = [[float(own), 1.0] for own in range(600)]
    events = (Event(kind="brush", offset_s=1.0, mask_index=0, data={"points": stroke}),)
    for _ in names:
        hand_in(desk, [DrawnMask(rle=square(2), seconds=3.0)], events)
    round_ = Round(number=1, stage="assisted", state="done", plan_step=0)
    round_numbers(store, tmp_path, round_)  # what is built once and kept is not counted below

    tracemalloc.start()
    found = round_numbers(store, tmp_path, round_)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert found.num_masks == num_tasks and found.work is not None
    assert found.work.events == {"brush": num_tasks}
    text_bytes = num_tasks * 12 * len(stroke)  # as JSON; as Python's lists it is many times that
    assert peak < text_bytes
    store.close()


def test_a_sample_of_a_round_of_people_has_the_masks_of_its_own_images(desk: Desk) -> None:
    desk.add_tasks(Task(id=f"t{n}", round=1, stage="assisted", image_id=n) for n in "abc")
    handed_in = [hand_in(desk, [DrawnMask(rle=square(1 + own))] * own) for own in (0, 1, 2)]
    round_ = Round(number=1, stage="assisted", state="done", plan_step=0)

    found = sampled_images(desk.store, Path(), round_, 2, seed=0)

    assert len(found) == 2
    for own in found:
        number = handed_in.index(f"t{own.image_id}")
        assert [one.rle["counts"] for one in own.masks] == [square(1 + number)["counts"]] * number
