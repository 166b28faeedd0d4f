"""A session records what an annotator does and hands in exactly the masks that were accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from data_engine.mask_store.store import Store
from data_engine.records import Image, Task
from data_engine.sessions import AnnotationSession, SessionError
from data_engine.tasks import Desk
from data_engine.time_model import SimulatedClock
from sam_train.inference.predictor import SamPredictor
from sam_train.models.sam import Sam
from sam_train.ops import rle
from sam_train.structures import ImageRecord

SIZE = (96, 96)
TASK = Task(id="t", round=1, stage="semi_automatic", image_id="a", version=1)


@pytest.fixture
def time() -> SimulatedClock:
    return SimulatedClock()


@pytest.fixture
def session(
    built_in_sam: Sam, synthetic_scenes: Sequence[ImageRecord], time: SimulatedClock
) -> AnnotationSession:
    """At a scene of 96 px, with the ready-made masks r1 and r2."""
    shown = [
        {"id": "r1", "rle": rle.encode(square(10, 10, 30)), "predicted_iou": 0.9, "model_id": "m0"},
        {"id": "r2", "rle": rle.encode(square(50, 50, 20)), "predicted_iou": 0.8, "model_id": "m0"},
    ]
    pixels = synthetic_scenes[0].image
    return AnnotationSession(built_in_sam, pixels, clock=time, shown=shown, model_id="m1")


def square(x: int, y: int, side: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_a_first_click_is_answered_by_three_candidates_best_first_and_a_second_by_one(
    session: AnnotationSession,
) -> None:
    first = session.click(40, 40)
    second = session.click(45, 45)

    assert [one.predicted_iou for one in first] == sorted(
        (one.predicted_iou for one in first), reverse=True
    )
    assert (len(first), len(second)) == (3, 1)


def test_a_click_goes_on_from_the_logits_of_the_candidate_that_was_chosen(
    session: AnnotationSession, built_in_sam: Sam, synthetic_scenes: Sequence[ImageRecord]
) -> None:
    candidates = session.click(40, 40)
    session.choose(2)
    (found,) = session.click(60, 20, 0)

    predictor = SamPredictor(built_in_sam)
    predictor.set_image(synthetic_scenes[0].image)
    points, labels = np.array([[40, 40], [60, 20]]), np.array([1, 0])
    masks, _, _ = predictor.predict(
        points, labels, mask_input=candidates[2].logits, multimask_output=False
    )
    np.testing.assert_array_equal(found.mask, masks[0])


def test_the_image_is_encoded_once(
    built_in_sam: Sam, synthetic_scenes: Sequence[ImageRecord], time: SimulatedClock
) -> None:
    passes = []
    handle = built_in_sam.image_encoder.register_forward_hook(lambda *_: passes.append(1))
    try:
        session = AnnotationSession(built_in_sam, synthetic_scenes[0].image, clock=time)
        session.click(40, 40)
        session.box(10, 10, 50, 50)
    finally:
        handle.remove()

    assert len(passes) == 1


def test_undo_and_redo_go_back_and_forth_between_the_same_masks(session: AnnotationSession) -> None:
    session.click(40, 40)
    before = session.mask
    session.paint([(5, 5), (20, 5)], 2)
    after = session.mask

    assert session.undo() and session.mask is before
    assert session.redo() and session.mask is after
    assert not session.redo()
    assert session.undo() and session.undo() and session.mask is None
    assert not session.undo()


def test_what_is_accepted_is_the_mask_seen_with_its_time_and_clicks(
    session: AnnotationSession, time: SimulatedClock
) -> None:
    time.spend(5)
    session.click(40, 40)
    session.accept()
    time.spend(2)
    session.click(20, 70)
    time.spend(3)
    session.click(22, 72)
    session.undo()
    mask = session.mask
    made = session.accept("cell")

    assert mask is not None
    np.testing.assert_array_equal(rle.decode(made.rle), mask)
    assert (made.seconds, made.num_clicks, made.point_coords) == (5.0, 2, ((20, 70),))
    assert (made.label, made.model_id, made.corrects) == ("cell", "m1", None)


def test_a_stroke_stays_in_the_mask_and_an_erased_one_does_not(session: AnnotationSession) -> None:
    corners = [(10, 10), (39, 10), (39, 39), (10, 39)]
    session.paint(corners, 0, fill=True)
    assert session.mask is not None
    np.testing.assert_array_equal(session.mask, square(10, 10, 30))

    session.erase([(10, 10), (39, 10)], 0)
    assert not session.mask[10].any() and session.mask[11:40, 10:40].all()


def test_a_click_after_a_stroke_begins_from_what_was_painted(session: AnnotationSession) -> None:
    session.paint([(10, 10), (39, 10), (39, 39), (10, 39)], 0, fill=True)
    logits = session.state.logits

    assert logits is not None and session.candidates == ()
    inside = square(10, 10, 30).mean()
    assert abs((logits > 0).mean() - inside) < 0.01  # the image is square: no padding


def test_a_ready_made_mask_is_kept_bit_for_bit(
    session: AnnotationSession, time: SimulatedClock
) -> None:
    time.spend(1.5)
    made = session.keep("r1")

    assert made.rle == rle.encode(square(10, 10, 30))
    assert (made.corrects, made.num_clicks, made.model_id) == ("r1", 0, "m0")
    assert (made.predicted_iou, made.seconds) == (0.9, 1.5)
    assert list(session.shown) == ["r2"]


def test_a_mended_mask_says_what_it_was_made_from_and_a_struck_out_one_is_not_handed_in(
    session: AnnotationSession,
) -> None:
    session.take_up("r1")
    session.erase([(10, 10), (39, 10)], 0)
    session.accept()
    session.delete("r2")

    (made,) = session.submission("s", TASK).masks
    assert (made.corrects, made.model_id, made.predicted_iou) == ("r1", "m0", None)
    assert rle.area(made.rle) == 30 * 29
    assert not session.shown


def test_events_name_the_place_of_the_mask_that_they_were_for(
    session: AnnotationSession, time: SimulatedClock
) -> None:
    session.click(40, 40)
    session.clear()
    time.spend(1)
    session.box(10, 10, 40, 40)
    session.accept()
    session.keep("r1")
    session.click(20, 70)
    session.accept()
    session.remove(1)  # the one with the box

    handed_in = session.submission("s", TASK)

    told = [(event.kind, event.mask_index, event.offset_s) for event in handed_in.events]
    assert told == [
        ("click", None, 0.0),
        ("delete", None, 0.0),
        ("box", None, 1.0),
        ("accept", None, 1.0),
        ("accept", 0, 1.0),
        ("click", 1, 1.0),
        ("accept", 1, 1.0),
        ("delete", None, 1.0),
    ]
    assert handed_in.events[0].data == {"x": 40, "y": 40, "label": 1}
    assert handed_in.masks[0].corrects == "r1" and len(handed_in.masks) == 2


def test_the_desk_takes_what_a_session_hands_in(session: AnnotationSession, store: Store) -> None:
    store.add_images([Image(id="a", key="a", width=96, height=96, path="a.png")])
    desk = Desk(store, clock=lambda: 0.0)
    desk.add_tasks([TASK])
    task = desk.next_task("anna")
    assert task is not None
    session.click(40, 40)
    session.paint([(40, 40)], 3)
    session.accept()
    session.keep("r2")
    handed_in = session.submission("s", task)

    receipt = desk.submit(handed_in, "anna")

    stored = list(store.masks())
    assert len(receipt.mask_ids) == 2
    assert [mask.rle["counts"] for mask in stored] == [m.rle["counts"] for m in handed_in.masks]


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        (lambda session: session.accept(), "no mask to accept"),
        (lambda session: session.click(96, 3), "outside of the image"),
        (lambda session: session.click(3, 3, 2), "label is 1 or 0"),
        (lambda session: session.box(10, 10, 10, 20), "x0 < x1"),
        (lambda session: session.choose(0), "candidate below 0"),
        (lambda session: session.paint([], 2), "a stroke has points"),
        (lambda session: session.paint([(4, 4), (9, 9)], 1e6), "a stroke has points"),
        (lambda session: session.paint([(4, 4)], float("nan")), "a stroke has points"),
        (lambda session: session.erase([(-1, 2)], 2), "outside of the image"),
        (lambda session: session.keep("r9"), "no ready-made mask r9"),
        (lambda session: session.remove(3), "no mask 3"),
        (lambda session: (session.click(4, 4), session.keep("r1")), "another object"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    session: AnnotationSession, what: Any, complaint: str
) -> None:
    with pytest.raises(SessionError, match=complaint):
        what(session)

    assert not session.masks and set(session.shown) == {"r1", "r2"}
