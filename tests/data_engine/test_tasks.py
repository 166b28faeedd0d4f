"""The desk hands each task to one annotator, and neither loses nor doubles what comes back."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_engine.mask_store.store import open_store
from data_engine.records import DrawnMask, Event, Submission, Task
from data_engine.tasks import Conflict, Desk
from sam_train.ops import rle


def task(task_id: str, image_id: str = "a", **values: Any) -> Task:
    return Task(id=task_id, round=1, stage="assisted", image_id=image_id, **values)


def square(x: int = 1, y: int = 2, side: int = 3, size: tuple[int, int] = (6, 8)) -> dict[str, Any]:
    mask = np.zeros(size, bool)
    mask[y : y + side, x : x + side] = True
    return rle.encode(mask)


def answer(to: Task, name: str = "s1", **values: Any) -> Submission:
    masks = values.pop("masks", (DrawnMask(rle=square(), seconds=4.0, num_clicks=2),))
    return Submission(submission_id=name, task_id=to.id, version=to.version, masks=masks, **values)


def taken(desk: Desk, annotator: str = "anna") -> Task:
    task = desk.next_task(annotator)
    assert task is not None
    return task


def test_tasks_go_out_by_priority_then_by_id(desk: Desk) -> None:
    desk.add_tasks([task("b"), task("B"), task("urgent", priority=2.0), task("a")])

    order = []
    while found := desk.next_task("anna"):
        order.append(found.id)
        desk.submit(answer(found, found.id), "anna")

    assert order == ["urgent", "B", "a", "b"]


def test_a_task_goes_to_one_annotator_at_a_time(desk: Desk) -> None:
    desk.add_tasks([task("t")])

    assert taken(desk, "anna").annotator == "anna"
    assert desk.next_task("ben") is None


def test_an_annotator_who_comes_back_finds_the_unfinished_task_as_it_was(desk: Desk) -> None:
    desk.add_tasks([task("t1"), task("t2", priority=1.0)])
    first = taken(desk)
    desk.add_tasks([task("t0", priority=9.0)])

    again = taken(desk)

    assert (again.id, again.version) == (first.id, first.version)


def test_an_expired_lease_is_handed_out_again_before_what_is_less_urgent(
    desk: Desk, clock: Any
) -> None:
    desk.add_tasks([task("urgent", priority=1.0), task("later")])
    taken(desk, "anna")
    clock.now += 60

    found = taken(desk, "ben")

    assert (found.id, found.version) == ("urgent", 2)


def test_a_renewed_lease_is_not_handed_out(desk: Desk, clock: Any) -> None:
    desk.add_tasks([task("t")])
    taken(desk, "anna")
    clock.now += 50
    desk.renew("t", "anna")
    clock.now += 50

    assert desk.next_task("ben") is None


def test_a_task_that_was_given_back_goes_to_the_next(desk: Desk) -> None:
    desk.add_tasks([task("t")])
    taken(desk, "anna")
    desk.release("t", "ben")  # is not ben's to give
    assert desk.next_task("ben") is None
    desk.release("t", "anna")

    assert taken(desk, "ben").id == "t"


def test_a_reserved_task_waits_for_its_annotator(desk: Desk) -> None:
    desk.add_tasks([task("t", reserved_for="ben")])

    assert desk.next_task("anna") is None
    assert taken(desk, "ben").id == "t"


def test_only_tasks_of_the_stage_asked_for_are_handed_out(desk: Desk) -> None:
    desk.add_tasks([task("t", priority=1.0), replace(task("look"), stage="audit")])

    found = desk.next_task("anna", stage="audit")

    assert found is not None and found.id == "look"


def test_a_submission_is_stored_with_what_its_pixels_and_its_task_say(
    desk: Desk, clock: Any
) -> None:
    desk.add_tasks([task("t", payload={"boxes": [[1, 2, 3, 4]]})])
    found = taken(desk)
    assert found.payload == {"boxes": [[1, 2, 3, 4]]}
    events = (Event(kind="click", offset_s=1.5, mask_index=0, data={"x": 2, "y": 3, "label": 1}),)
    mask = DrawnMask(
        rle=square(), label="cell", point_coords=((2.0, 3.0),), predicted_iou=0.9, num_clicks=1
    )
    clock.now += 10

    receipt = desk.submit(answer(found, masks=(mask,), events=events, seconds=9.0), "anna")

    (stored,) = desk.store.masks()
    assert receipt.mask_ids == (stored.id,)
    assert (stored.image_id, stored.task_id, stored.round, stored.source) == (
        "a",
        "t",
        1,
        "assisted",
    )
    assert (stored.bbox, stored.area, stored.rle) == ((1.0, 2.0, 3.0, 3.0), 9, square())
    assert (stored.author, stored.label, stored.point_coords) == ("anna", "cell", ((2.0, 3.0),))
    assert (stored.predicted_iou, stored.created_at) == (0.9, 1010.0)
    (submission,) = desk.store.submissions(round=1)
    assert (submission.events, submission.seconds) == (events, 9.0)
    assert desk.store.count_tasks() == {"done": 1}


def test_the_same_submission_again_gives_the_same_receipt_and_no_second_mask(
    desk: Desk, clock: Any
) -> None:
    desk.add_tasks([task("t")])
    submission = answer(taken(desk))
    first = desk.submit(submission, "anna")
    clock.now += 1000

    assert desk.submit(submission, "anna") == first
    assert desk.store.num_masks() == 1


def test_another_submission_of_the_same_id_is_refused(desk: Desk) -> None:
    desk.add_tasks([task("t")])
    found = taken(desk)
    desk.submit(answer(found), "anna")

    with pytest.raises(Conflict, match="another submission"):
        desk.submit(answer(found, masks=(DrawnMask(rle=square(side=2)),)), "anna")
    with pytest.raises(Conflict, match="another submission"):
        desk.submit(answer(found), "ben")


def test_a_late_submission_is_taken_if_nobody_else_got_the_task(desk: Desk, clock: Any) -> None:
    desk.add_tasks([task("t")])
    found = taken(desk)
    clock.now += 10_000

    desk.submit(answer(found), "anna")

    assert desk.store.num_masks() == 1


@pytest.mark.parametrize("is_done", [False, True])
def test_a_late_submission_is_refused_if_another_holds_or_did_the_task(
    desk: Desk, clock: Any, is_done: bool
) -> None:
    desk.add_tasks([task("t")])
    mine = taken(desk, "anna")
    clock.now += 60
    theirs = taken(desk, "ben")
    if is_done:
        desk.submit(answer(theirs, "s2"), "ben")

    with pytest.raises(Conflict, match="ben"):
        desk.submit(answer(mine), "anna")

    assert [mask.author for mask in desk.store.masks()] == ["ben"] * is_done


def test_a_submission_of_an_earlier_handing_out_is_refused(desk: Desk, clock: Any) -> None:
    desk.add_tasks([task("t")])
    before = taken(desk, "anna")
    clock.now += 60
    taken(desk, "ben")
    desk.release("t", "ben")
    now = taken(desk, "anna")

    with pytest.raises(Conflict, match="version 3.*version 1"):
        desk.submit(answer(before), "anna")
    desk.submit(answer(now, "s2"), "anna")

    assert desk.store.num_masks() == 1


def test_what_was_withdrawn_given_back_or_never_there_is_refused(desk: Desk) -> None:
    desk.add_tasks([task("t1", priority=1.0), task("t2")])
    first = taken(desk)
    assert desk.withdraw(["t1"]) == 1
    second = taken(desk)
    desk.release("t2", "anna")

    for submission, reason in (
        (answer(first), "withdrawn"),
        (answer(second), "given back"),
        (answer(task("t3")), "not on the desk"),
    ):
        with pytest.raises(Conflict, match=reason):
            desk.submit(submission, "anna")
    with pytest.raises(Conflict, match="withdrawn"):
        desk.renew("t1", "anna")
    assert desk.store.num_masks() == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (square(size=(8, 6)), "8, 6"),
        ({"size": [6, 8], "counts": "%"}, "damaged"),
        (rle.encode(np.zeros((6, 8), bool)), "empty"),
    ],
)
def test_of_a_submission_with_a_bad_mask_nothing_is_stored(
    desk: Desk, bad: dict[str, Any], reason: str
) -> None:
    desk.add_tasks([task("t")])
    found = taken(desk)

    with pytest.raises(ValueError, match=f"mask 1 of s1: .*{reason}"):
        desk.submit(answer(found, masks=(DrawnMask(rle=square()), DrawnMask(rle=bad))), "anna")

    assert desk.store.num_masks() == 0
    assert taken(desk).version == found.version


def test_a_project_s_classes_are_the_only_ones_and_are_not_asked_for(desk: Desk) -> None:
    desk.add_tasks([task("t1"), task("t2", "b")])
    desk.labels = ["cell", "debris"]
    found = taken(desk)

    with pytest.raises(ValueError, match="its label is 'cel'; this project has cell, debris"):
        desk.submit(answer(found, masks=(DrawnMask(rle=square(), label="cel"),)), "anna")
    assert desk.store.num_masks() == 0
    masks = (DrawnMask(rle=square(), label="cell"), DrawnMask(rle=square()))
    desk.submit(answer(found, masks=masks), "anna")

    assert [mask.label for mask in desk.store.masks()] == ["cell", None]


def test_an_event_of_a_mask_that_was_not_handed_in_is_refused(desk: Desk) -> None:
    desk.add_tasks([task("t")])
    events = (Event(kind="look", offset_s=0.0, mask_index=1),)

    with pytest.raises(ValueError, match="mask 1 of 1"):
        desk.submit(answer(taken(desk), events=events), "anna")


def test_an_image_with_nothing_on_it_is_done_too(desk: Desk) -> None:
    desk.add_tasks([task("t")])

    assert desk.submit(answer(taken(desk), masks=()), "anna").mask_ids == ()
    assert desk.next_task("anna") is None


def test_tasks_that_are_known_stay_as_they_are(desk: Desk) -> None:
    assert desk.add_tasks([task("t")]) == 1
    desk.submit(answer(taken(desk)), "anna")

    assert desk.add_tasks([task("t"), task("new")]) == 1
    assert desk.store.count_tasks() == {"done": 1, "open": 1}


def test_tasks_are_added_all_or_none(desk: Desk) -> None:
    with pytest.raises(ValueError, match="not registered"):
        desk.add_tasks([task("t"), task("u", image_id="unknown")])

    assert desk.store.count_tasks() == {}


def test_many_who_ask_and_send_at_once_do_each_task_once(desk: Desk, store_url: str) -> None:
    desk.add_tasks(task(f"t{number:02}") for number in range(24))
    refused: list[str] = []

    def work(annotator: str) -> None:
        mine = open_store(store_url)
        own = Desk(mine, clock=desk.clock, lease_s=60)
        while found := own.next_task(annotator):
            submission = answer(found, f"{annotator}-{found.id}")
            try:
                # As impatient clients do: the same twice at once.
                twin = threading.Thread(target=own.submit, args=(submission, annotator))
                twin.start()
                own.submit(submission, annotator)
                twin.join()
            except Conflict as error:
                refused.append(str(error))
        mine.close()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("anna", "ben", "cy")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert refused == []
    assert sorted(mask.task_id for mask in desk.store.masks()) == [f"t{n:02}" for n in range(24)]


def test_an_annotator_without_a_name_is_refused(desk: Desk) -> None:
    with pytest.raises(ValueError, match="name"):
        desk.next_task(" ")
