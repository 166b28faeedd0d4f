"""Audits: who sees what, what becomes of it, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_engine.audit import Audit, audit_result, audit_tasks, collect_reviews
from data_engine.automatic_shards import AutomaticImage, automatic_shards, sample_images
from data_engine.mask_store.lineage import take_down
from data_engine.mask_store.store import Store
from data_engine.records import DrawnMask, Image, Review, Submission, Task
from data_engine.tasks import Desk
from sam_train.ops import rle

WHOLE = rle.encode(np.ones((6, 8), bool))


def square(width: int) -> dict[str, Any]:
    """The first columns of an image of 8 x 6 px (width x height)."""
    mask = np.zeros((6, 8), bool)
    mask[:, :width] = True
    return rle.encode(mask)


def sampled(engine: Any, number: int, num_images: int, seed: int = 0) -> list[AutomaticImage]:
    shards = automatic_shards(engine.store, engine.root, number)
    return sample_images(engine.store, shards, num_images, seed=seed, with_masks=False)


@pytest.fixture
def labelled(scenes: Any) -> Any:
    """Four scenes with automatic masks, as round 1."""
    scenes.automatic(1, scenes.images)
    return scenes


def test_a_sample_begins_with_the_smaller_one_and_holds_what_its_shards_hold(labelled: Any) -> None:
    all_of_it = sampled(labelled, 1, 100)

    assert [own.image.key for own in sampled(labelled, 1, 2)] == [
        own.image.key for own in all_of_it[:2]
    ]
    assert {own.image.id for own in all_of_it} == {own.id for own in labelled.images}
    num_masks = sum(own.num_masks for own in labelled.store.shards(round=1))
    assert sum(len(own.annotations) for own in all_of_it) == num_masks > 0
    orders = {tuple(own.image.key for own in sampled(labelled, 1, 4, seed)) for seed in range(8)}
    assert len(orders) > 1


def test_the_same_images_are_drawn_however_the_shards_are_cut(
    labelled: Any, fill: Callable[..., Any], write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "again" / "scenes-000000.tar", 4)
    thresholds = "preset.pred_iou_thresh=0.2", "preset.stability_score_thresh=0.5"
    other = fill(shard, *thresholds, root=tmp_path / "other")
    other.automatic(1, other.images[:1])
    other.automatic(2, other.images[::-1])

    one, two = (
        [own.image.key for own in sampled(engine, number, 3)]
        for engine, number in ((labelled, 1), (other, 2))
    )

    assert one == two


def test_pixels_are_those_of_the_shard(labelled: Any) -> None:
    from data_engine.images import image_pixels

    for own in sampled(labelled, 1, 4):
        np.testing.assert_array_equal(own.pixels(), image_pixels(own.image))


def test_an_audit_shows_every_mask_of_its_images_and_adding_it_again_adds_nothing(
    labelled: Any,
) -> None:
    tasks = audit_tasks(labelled.store, labelled.root, 1, Audit(num_images=2))

    assert labelled.desk.add_tasks(tasks) == 2
    again = audit_tasks(labelled.store, labelled.root, 1, Audit(num_images=2))
    assert labelled.desk.add_tasks(again) == 0
    for own, task in zip(sampled(labelled, 1, 2), tasks, strict=True):
        assert task.image_id == own.image.id
        shown = [(mask["rle"], mask["predicted_iou"]) for mask in task.payload["masks"]]
        assert shown == [(dict(mask.rle), mask.predicted_iou) for mask in own.annotations]
        assert {mask["id"] for mask in task.payload["masks"]} == {
            f"{own.shard.path}#{mask.id}" for mask in own.annotations
        }
    first = labelled.desk.next_task("anna", stage="audit")
    assert first is not None and first.id == tasks[0].id, "a half-done audit is a random sample too"


def test_an_image_that_was_taken_down_is_not_drawn(labelled: Any) -> None:
    (gone,) = sampled(labelled, 1, 1)
    take_down(labelled.store, gone.image.id, reason="asked", who="a person", now=0.0)

    tasks = audit_tasks(labelled.store, labelled.root, 1, Audit(num_images=10))

    assert len(tasks) == 3
    assert gone.image.id not in {task.image_id for task in tasks}


def test_a_shard_that_is_gone_ends_the_audit_with_its_name(labelled: Any) -> None:
    shard = labelled.shards(1)[0]
    shard.unlink()

    with pytest.raises(FileNotFoundError, match=f"{shard.name} is gone or damaged: put it back"):
        audit_tasks(labelled.store, labelled.root, 1, Audit())


def test_a_round_without_automatic_masks_cannot_be_audited(scenes: Any) -> None:
    with pytest.raises(ValueError, match="round 1 has no automatic mask"):
        audit_tasks(scenes.store, scenes.root, 1, Audit())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 0}, "num_images of 1 or more"),
        ({"pair": ["anna", "anna"]}, "two annotators"),
    ],
)
def test_a_wrong_audit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Audit(**settings)


def handed_in(desk: Desk, shown: Sequence[Any], masks: Sequence[DrawnMask]) -> None:
    """An audit of image a with masks m0, m1, ... done by anna."""
    payload = {"masks": [{"id": f"m{i}", "rle": own} for i, own in enumerate(shown)]}
    desk.add_tasks([Task(id="t", round=1, stage="audit", image_id="a", payload=payload)])
    task = desk.next_task("anna")
    assert task is not None
    answer = Submission(submission_id="s", task_id="t", version=task.version, masks=tuple(masks))
    desk.submit(answer, "anna")


def test_reviews_say_what_became_of_each_mask(desk: Desk, store: Store) -> None:
    handed_in(
        desk,
        [WHOLE, square(4), square(2)],
        [
            DrawnMask(rle=WHOLE, corrects="m0"),
            DrawnMask(rle=square(5), corrects="m1", seconds=7.0),
            DrawnMask(rle=square(1)),
        ],
    )

    assert collect_reviews(store, 1) == 3
    assert collect_reviews(store, 1) == 0

    kept, mended, struck_out = store.reviews(round=1)
    assert (kept.iou, kept.after) == (1.0, WHOLE)
    assert (mended.iou, mended.after) == (pytest.approx(4 / 5), square(5))
    assert (mended.annotator, mended.before_id, mended.seconds) == ("anna", "m1", 7.0)
    assert (struck_out.iou, struck_out.after) == (0.0, None)
    result = audit_result(store, 1)
    assert result is not None
    assert (result.num_images, result.num_masks, result.num_untouched) == (1, 3, 1)
    assert (result.num_struck_out, result.num_added) == (1, 1)
    assert result.mean_iou == pytest.approx(0.6)


def test_of_a_mask_that_was_divided_the_part_nearest_to_it_counts(desk: Desk, store: Store) -> None:
    parts = [DrawnMask(rle=square(width), corrects="m0") for width in (2, 6)]

    handed_in(desk, [WHOLE], parts)

    collect_reviews(store, 1)
    (review,) = store.reviews(round=1)
    assert (review.iou, review.after) == (pytest.approx(6 / 8), square(6))


def reviewed(store: Store, ious: dict[str, Sequence[float]]) -> None:
    store.add_reviews(
        Review(
            id=f"{image}/{place}", round=1, image_id=image, annotator="anna", before_id="m",
            before=WHOLE, after=WHOLE, iou=iou,
        )
        for image, own in ious.items()
        for place, iou in enumerate(own)
    )  # fmt: skip


def test_shares_are_of_pairs_greater_than_the_bounds(
    store: Store, image: Callable[..., Image]
) -> None:
    store.add_images(image(name) for name in "ab")
    reviewed(store, {"a": [0.90, 0.95], "b": [0.75, 0.8, 0.0]})

    result = audit_result(store, 1)

    assert result is not None
    assert result.share_over_90 == pytest.approx(1 / 5)
    assert result.share_over_75 == pytest.approx(3 / 5)


def test_the_interval_is_over_images_and_not_over_masks(
    store: Store, image: Callable[..., Image]
) -> None:
    store.add_images(image(name) for name in "abcd")
    reviewed(store, {name: [0.95] * 9 + [0.1] for name in "abcd"})
    alike = audit_result(store, 1)
    # As many good masks, but all bad ones lie on one image.
    store.add_images([replace(image("e"), key="e")])
    reviewed(store, {"e": [0.1] * 10})
    unlike = audit_result(store, 1)

    assert alike is not None and unlike is not None
    assert alike.interval_over_90 == pytest.approx((0.9, 0.9))
    low, high = unlike.interval_over_90
    assert low < unlike.share_over_90 - 0.2 and high == pytest.approx(0.9)


def test_a_round_that_nobody_looked_at_has_no_result(store: Store) -> None:
    assert audit_result(store, 1) is None


def test_an_audit_of_real_masks_is_done_through_the_desk(labelled: Any) -> None:
    labelled.audit(1, Audit(num_images=3))

    assert collect_reviews(labelled.store, 1) > 0

    result = audit_result(labelled.store, 1)
    assert result is not None
    assert result.num_images == 3
    assert 0 < result.share_over_90 <= result.share_over_75 < 1
    assert result.annotators == ("anna",)
    ids = {own.before_id for own in labelled.store.reviews(round=1)}
    for own in sampled(labelled, 1, 3):
        assert {f"{own.shard.path}#{mask.id}" for mask in own.annotations} <= ids
    assert json.dumps([own.iou for own in labelled.store.reviews(round=1)])
