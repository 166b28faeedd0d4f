"""A simulated annotator works as a person would, and does the same whenever it is asked the same."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from omegaconf import OmegaConf

from data_engine.annotator_settings import AnnotatorSettings, Attention, Patience, Standards
from data_engine.embeddings import Embeddings
from data_engine.human_noise import Eye, Hand, iou
from data_engine.image_finding import find_images
from data_engine.images import register
from data_engine.mask_store.store import Store, open_store
from data_engine.records import Event, Image, Rle, Submission, Task
from data_engine.simulated_annotator import SimulatedAnnotator
from data_engine.stages.assisted import assisted_tasks
from data_engine.tasks import Desk
from data_engine.truth import UnknownTruthError, known_truth
from sam_train import config
from sam_train.inference.predictor import SamPredictor
from sam_train.models.sam import Sam
from sam_train.ops import rle

SHARP = AnnotatorSettings(
    box_prob=0,
    attention=Attention(leave_out_prob=0, leave_out_small_prob=0, leave_out_hidden_prob=0),
    eye=Eye(iou_noise=0),
    hand=Hand(click_noise_px=0, box_noise=0, boundary_noise=0),
    patience=Patience(move_on_after_s=None, max_image_s=1e9),
)
"""Overlooks nothing, sees and paints without error, and has all the time in the world."""


class Office:
    """A desk with scenes on it, and annotators who come."""

    def __init__(self, path: Path, shard: Path, model: Sam) -> None:
        self.store: Store = open_store(path, create=True)
        register(self.store, find_images(str(shard)))
        self.images = sorted(self.store.images(), key=lambda image: image.key)
        self.desk = Desk(self.store, clock=lambda: 0.0)
        self.predictor = SamPredictor(model)

    def annotator(self, settings: AnnotatorSettings | None = None, **more: Any) -> Any:
        truth = more.pop("truth", None)
        return SimulatedAnnotator(
            self.desk, self.store, truth, self.predictor, settings, model_id="m", **more
        )

    def task(self, stage: str = "assisted", number: int = 0, **payload: Any) -> Task:
        image = self.images[number]
        return Task(
            id=f"{stage}-{number}", round=1, stage=stage, image_id=image.id, payload=payload
        )  # type: ignore[arg-type]

    def truth(self, number: int = 0) -> list[np.ndarray]:
        return [rle.decode(one) for one in known_truth(self.images[number])]


@pytest.fixture
def office(tmp_path: Path, write_shard: Callable[..., Path], built_in_sam: Sam) -> Any:
    found = Office(tmp_path / "engine.sqlite", write_shard(tmp_path / "in.tar", 3), built_in_sam)
    yield found
    found.store.close()


def masks_of(submission: Submission) -> list[np.ndarray]:
    return [rle.decode(one.rle) for one in submission.masks]


def best_ious(submission: Submission, truth: Sequence[np.ndarray]) -> list[float]:
    return [max(iou(mask, gt) for gt in truth) for mask in masks_of(submission)]


def test_work_hands_in_every_task_through_the_desk(office: Office) -> None:
    office.desk.add_tasks(assisted_tasks(office.store, 1, office.images))

    done = office.annotator().work("assisted")

    assert done.num_tasks == 3 and office.store.count_tasks() == {"done": 3}
    masks = list(office.store.masks())
    assert done.num_masks == len(masks) > 3
    assert {mask.author for mask in masks} == {"simulated-0"}
    handed_in = office.store.submissions()
    assert done.seconds == pytest.approx(sum(own.seconds for own in handed_in))


def test_the_same_seed_gives_the_same_submissions_in_any_order(office: Office) -> None:
    tasks = [office.task(number=number) for number in range(3)]

    there = {task.id: office.annotator().answer(task)[0] for task in tasks}
    annotator = office.annotator()
    back = {task.id: annotator.answer(task)[0] for task in reversed(tasks)}
    other = office.annotator(AnnotatorSettings(seed=1)).answer(tasks[0])[0]

    assert there == back
    assert other.events != there[tasks[0].id].events


def test_a_killed_annotators_retry_is_the_same_submission(office: Office) -> None:
    office.desk.add_tasks([office.task()])
    first, second = office.annotator(), office.annotator()
    task = office.desk.next_task("simulated-0")
    assert task is not None
    office.desk.submit(first.answer(task)[0], "simulated-0")

    receipt = office.desk.submit(second.answer(task)[0], "simulated-0")

    assert receipt.submission_id == "assisted-0-v1"
    assert office.store.num_masks() == len(receipt.mask_ids)


def test_all_masks_of_a_sharp_annotator_are_good_enough_and_its_clicks_are_where_errors_were(
    office: Office,
) -> None:
    submission, seen = office.annotator(SHARP).answer(office.task())
    truth = office.truth()

    assert min(best_ious(submission, truth)) >= SHARP.standards.acceptable
    assert len(submission.masks) + seen.given_up == len(truth) and seen.left_out == 0
    first = [event for event in submission.events if event.kind == "click"][0]
    inside = [gt for gt in truth if gt[int(first.data["y"]), int(first.data["x"])]]
    assert first.data["label"] == 1 and inside


def test_objects_are_labelled_the_most_prominent_first(office: Office) -> None:
    big, small = np.zeros((96, 96), bool), np.zeros((96, 96), bool)
    big[10:60, 10:60] = small[80:88, 80:88] = True

    def two_objects(image: Image) -> list[Rle]:
        return [rle.encode(small), rle.encode(big)]

    submission, _ = office.annotator(SHARP, truth=two_objects).answer(office.task())

    first = next(event for event in submission.events if event.kind == "click")
    assert big[int(first.data["y"]), int(first.data["x"])]


def test_what_cannot_be_clicked_is_painted_as_well_as_the_hand_can(office: Office) -> None:
    comb = np.zeros((96, 96), bool)
    comb[10:80, 10:80] = True
    comb[20:80, 24:36] = comb[20:80, 50:62] = False
    settings = replace(
        SHARP,
        patience=Patience(max_clicks=1, useless_clicks=9, move_on_after_s=None),
        standards=Standards(good_enough=0.99),
    )

    submission, _ = office.annotator(settings, truth=lambda _: [rle.encode(comb)]).answer(
        office.task()
    )

    assert {"brush", "eraser"} & {event.kind for event in submission.events}
    (found,) = masks_of(submission)
    assert iou(found, comb) > 0.85
    assert submission.masks[0].num_clicks == 1


def test_it_moves_on_from_a_mask_when_the_time_is_over(office: Office) -> None:
    noise = np.random.default_rng(0).random((96, 96)) < 0.5  # nothing that a click could segment
    settings = replace(SHARP, patience=Patience(max_clicks=1000, useless_clicks=1000))

    def seconds(**payload: Any) -> float:
        annotator = office.annotator(settings, truth=lambda _: [rle.encode(noise)])
        submission, seen = annotator.answer(office.task(**payload))
        assert seen.given_up == 1 and not submission.masks
        return submission.seconds

    by_default, by_task = seconds(), seconds(move_on_after_s=10)
    assert 30 <= by_default < 30 + 10  # what was begun is ended
    assert 10 <= by_task < 10 + 10


def test_it_begins_no_object_when_the_time_for_an_image_is_over(office: Office) -> None:
    settings = replace(SHARP, patience=Patience(max_image_s=8))

    submission, seen = office.annotator(settings).answer(office.task())

    assert seen.left_out > 0
    assert submission.seconds < 8 + 30 + 10


def test_small_and_hidden_objects_are_left_out_with_the_stated_probability(office: Office) -> None:
    attention = Attention(
        leave_out_prob=0.1,
        leave_out_small_prob=0.5,
        small_below_px=12,
        leave_out_hidden_prob=0.4,
        hidden_below_levels=6,
    )

    assert attention.leave_out(50, 100) == pytest.approx(0.1)
    assert attention.leave_out(5, 100) == pytest.approx(1 - 0.9 * 0.5)
    assert attention.leave_out(5, 0) == pytest.approx(1 - 0.9 * 0.5 * 0.6)
    blind = replace(SHARP, attention=replace(attention, leave_out_prob=1.0))
    submission, seen = office.annotator(blind).answer(office.task())
    assert not submission.masks and seen.left_out == len(office.truth())


def test_ready_made_masks_are_kept_mended_or_struck_out_and_what_is_missing_is_added(
    office: Office,
) -> None:
    truth = sorted(office.truth(), key=np.count_nonzero, reverse=True)
    good, rough = truth[0], truth[1].copy()
    rows = np.flatnonzero(rough.any(1))
    rough[rows[int(len(rows) * 0.7)] :] = False
    wrong = np.zeros_like(good)
    wrong[:3, :3] = True
    named = {"good": good, "again": good, "rough": rough, "wrong": wrong}
    shown = [{"id": name, "rle": rle.encode(mask)} for name, mask in named.items()]
    only_two = [rle.encode(mask) for mask in truth[:3]]

    submission, _ = office.annotator(SHARP, truth=lambda _: only_two).answer(
        office.task("semi_automatic", masks=shown)
    )

    made = {mask.corrects: mask for mask in submission.masks}
    assert made["good"].rle == shown[0]["rle"] and made["good"].num_clicks == 0
    assert "again" not in made and "wrong" not in made
    if "rough" in made:  # else it could not be mended
        mended = rle.decode(made["rough"].rle)
        assert iou(mended, truth[1]) > iou(rough, truth[1])
    added = [mask for mask in submission.masks if mask.corrects is None]
    assert all(iou(rle.decode(mask.rle), truth[2]) > 0.7 for mask in added)


def test_who_audits_adds_nothing_but_labels_what_is_handed_out_bare(office: Office) -> None:
    (largest,) = sorted(office.truth(), key=np.count_nonzero)[-1:]
    shown = [{"id": "s#1", "rle": rle.encode(largest)}]

    looked, _ = office.annotator(SHARP).answer(office.task("audit", masks=shown))
    drawn, _ = office.annotator(SHARP).answer(office.task("audit", masks=[], pair=True))

    assert [mask.corrects for mask in looked.masks] == ["s#1"]
    assert len(drawn.masks) > 1


def test_who_audits_looks_at_every_mask_however_long_it_takes(office: Office) -> None:
    shown = [{"id": f"s#{n}", "rle": rle.encode(mask)} for n, mask in enumerate(office.truth())]
    hasty = office.annotator(replace(SHARP, patience=Patience(max_image_s=3.5)))

    audited, _ = hasty.answer(office.task("audit", masks=shown))
    labelled, _ = hasty.answer(office.task("semi_automatic", masks=shown))

    # What does not come back counts as struck out.
    assert len(audited.masks) == len(shown) > 1 == len(labelled.masks)


@dataclass(frozen=True, kw_only=True)
class Told(Eye):
    """Sees what it is told to."""

    looks: list[float] = field(default_factory=list)

    def judge(self, mask: Any, gt_mask: Any, generator: Any) -> float:
        return self.looks.pop(0)


def test_what_is_left_after_an_undo_is_no_better_than_it_was(office: Office) -> None:
    # Three candidates; two clicks that each make it worse, the second so much that it is undone; no time left.
    looks = [0.80, 0.1, 0.1, 0.72, 0.60]
    settings = replace(SHARP, eye=Told(looks=looks))
    annotator = office.annotator(settings, truth=lambda image: known_truth(image)[:1])

    submission, seen = annotator.answer(office.task(move_on_after_s=12.9))

    assert [own.kind for own in submission.events][-2:] == ["undo", "delete"]
    assert seen.given_up == 1 and not submission.masks  # 0.72 is not acceptable


def strokes_s(event: Event, scale: float) -> set[float]:
    """What a stroke takes by the model, whatever the size of the object on the screen."""
    points = np.array(event.data["points"], np.int32).reshape(-1, 1, 2)
    length_px = cv2.arcLength(points, True)
    return {
        SHARP.time.painting_s(length_px, object_px=side, screen_scale=scale)
        for side in range(1, 97)
    }


def test_every_second_of_a_submission_is_one_that_the_time_model_states(office: Office) -> None:
    settings, time = AnnotatorSettings(patience=Patience(useless_clicks=1)), SHARP.time
    scale, kinds = settings.screen_px / 96, Counter[str]()
    # On the way to what an event records: a new object found, masks looked at, an undo or a choice.
    before = {
        find * time.find_s + looks * time.look_s + keys * time.key_s
        for find, looks, keys in product((0, 1), (0, 1, 3), (0, 1))
    }
    own = {"click": time.click_s, "box": time.box_s} | dict.fromkeys(
        ("look", "undo", "accept", "delete"), time.key_s
    )

    for number in range(3):
        submission, _ = office.annotator(settings).answer(office.task(number=number))
        at = time.open_image_s
        for event in submission.events:
            took, at = event.offset_s - at, event.offset_s
            ends = {own[event.kind]} if event.kind in own else strokes_s(event, scale)
            assert any(
                took == pytest.approx(start + end, abs=1e-6) for start in before for end in ends
            ), (event.kind, took)
            kinds[event.kind] += 1
        assert submission.seconds == pytest.approx(at)
    assert {"click", "look", "undo", "accept", "brush"} <= set(kinds), kinds


def test_embeddings_made_ahead_give_the_same_answers_and_spare_the_encoder(
    office: Office, tmp_path: Path
) -> None:
    ahead = Embeddings(tmp_path / "embeddings", office.predictor)
    expected, _ = office.annotator().answer(office.task())
    assert ahead.ahead(office.images) == 3 and ahead.ahead(office.images) == 0
    passes: list[int] = []
    encoder = office.predictor.model.image_encoder
    handle = encoder.register_forward_hook(lambda *_: passes.append(1))
    try:
        found, _ = office.annotator(embeddings=ahead).answer(office.task())
    finally:
        handle.remove()

    assert passes == [] and found == expected
    shutil.rmtree(tmp_path / "embeddings")
    assert office.annotator(embeddings=ahead).answer(office.task())[0] == expected


def test_without_ground_truth_it_says_so(office: Office, tmp_path: Path) -> None:
    office.store.add_images([Image(id="a", key="a", width=8, height=8, path="/images/a.jpg")])

    with pytest.raises(UnknownTruthError):
        known_truth(office.store.image("a"))
    with pytest.raises(ValueError, match="called simulated-NUMBER"):
        office.annotator(name="anna")


def test_the_packaged_constants_are_the_ones_in_the_code() -> None:
    path = config.conf_dir() / "annotator" / "simulated.yaml"

    assert config.instantiate(OmegaConf.load(path)) == AnnotatorSettings()


@pytest.fixture
def nuclei(tmp_path: Path, shared_data: Path, built_in_sam: Sam) -> Any:
    """Three real images with 70 objects or so."""
    found = Office.__new__(Office)
    found.store = open_store(tmp_path / "nuclei.sqlite", create=True)
    shard = shared_data / "nuclei" / "val-000000.tar"
    register(found.store, islice(find_images(str(shard)), 3))
    found.images = sorted(found.store.images(), key=lambda image: image.key)
    found.desk, found.predictor = Desk(found.store), SamPredictor(built_in_sam)
    yield found
    found.store.close()


def test_on_real_nuclei_the_masks_are_near_the_truth_at_a_few_clicks_each(nuclei: Office) -> None:
    nuclei.desk.add_tasks(assisted_tasks(nuclei.store, 1, nuclei.images))

    done = nuclei.annotator().work("assisted")

    assert done.num_masks >= 10
    assert done.num_clicks / done.num_masks < 4
    assert 4 < done.seconds / done.num_masks < 30
    for number, image in enumerate(nuclei.images):
        truth = nuclei.truth(number)
        found = [rle.decode(mask.rle) for mask in nuclei.store.masks(image_id=image.id)]
        assert not found or np.mean([max(iou(m, gt) for gt in truth) for m in found]) > 0.8
