"""Agreement of two annotators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_engine.agreement import agreements, matched_ious
from data_engine.audit import Audit, audit_tasks, collect_reviews, second_looks
from data_engine.records import DrawnMask, Submission

PAIR = Audit(num_images=3, pair=["ben", "anna"], num_pair_images=2)


def test_matching_takes_the_best_for_both_and_not_the_best_first() -> None:
    assert sorted(matched_ious(np.array([[0.9, 0.8], [0.7, 0.0]]))) == [0.7, 0.8]


def test_no_mask_is_in_two_pairs_and_what_is_hardly_common_is_in_none() -> None:
    assert matched_ious(np.array([[0.9, 0.0], [0.8, 0.0], [0.0, 0.5]])).tolist() == [0.9]
    assert matched_ious(np.zeros((0, 3))).tolist() == []


def test_a_common_object_is_not_given_up_for_several_that_are_none() -> None:
    # The sum of all IoUs would be largest with the two of 0.45.
    assert matched_ious(np.array([[0.6, 0.45], [0.45, 0.0]])).tolist() == [0.6]


@pytest.fixture
def labelled(scenes: Any) -> Any:
    scenes.automatic(1, scenes.images)
    return scenes


def test_each_of_a_pair_gets_the_same_images_empty_and_nobody_else_does(labelled: Any) -> None:
    tasks = audit_tasks(labelled.store, labelled.root, 1, PAIR)
    pair = [task for task in tasks if task.reserved_for]

    assert len(tasks) == 3 + 2 * 2
    assert all(task.payload["masks"] == [] for task in pair)
    by_name = {
        name: [task.image_id for task in pair if task.reserved_for == name]
        for name in PAIR.pair or ()
    }
    assert by_name["anna"] == by_name["ben"] == [task.image_id for task in tasks[:2]]
    labelled.desk.add_tasks(pair)
    assert labelled.desk.next_task("carl", stage="audit") is None


def test_who_draws_the_same_agrees_in_all(labelled: Any) -> None:
    labelled.audit(1, PAIR)

    (found,) = agreements(labelled.store, 1)

    assert found.annotators == ("anna", "ben")
    assert (found.num_images, found.share_common) == (2, 1.0)
    assert found.mean_iou == pytest.approx(1)
    assert found.num_masks[0] == found.num_masks[1] == found.num_common > 0


def test_what_one_leaves_out_and_draws_otherwise_lowers_both_figures(labelled: Any) -> None:
    tasks = [own for own in audit_tasks(labelled.store, labelled.root, 1, PAIR) if own.reserved_for]
    labelled.desk.add_tasks(tasks)
    objects = {own.id: labelled.truth[own.key] for own in labelled.images}
    expected, num_common, num_masks = [], 0, 0
    for name in ("anna", "ben"):
        while (task := labelled.desk.next_task(name)) is not None:
            own = objects[task.image_id]
            if name == "ben":
                own = own[1:]
                num_common += len(own)
            num_masks += len(own)
            answer = Submission(
                submission_id=task.id, task_id=task.id, version=task.version,
                masks=tuple(DrawnMask(rle=one) for one in own),
            )  # fmt: skip
            labelled.desk.submit(answer, name)
            expected.append(len(own))

    (found,) = agreements(labelled.store, 1)

    assert found.num_common == num_common < sum(found.num_masks) / 2
    assert found.share_common == pytest.approx(2 * num_common / num_masks)


def test_what_a_pair_draws_is_no_review(labelled: Any) -> None:
    labelled.audit(1, PAIR)

    collect_reviews(labelled.store, 1)

    assert len(second_looks(labelled.store, 1)) == 3
    assert {own.annotator for own in labelled.store.reviews(round=1)} == {"anna"}


def test_a_pair_of_whom_one_has_not_begun_agrees_on_nothing_yet(labelled: Any) -> None:
    tasks = [own for own in audit_tasks(labelled.store, labelled.root, 1, PAIR) if own.reserved_for]
    labelled.desk.add_tasks(tasks)
    task = labelled.desk.next_task("anna")
    labelled.desk.submit(
        Submission(submission_id="s", task_id=task.id, version=task.version), "anna"
    )

    assert agreements(labelled.store, 1) == []
