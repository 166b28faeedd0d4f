"""All that came from an image can be named, and taken down."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from data_engine.mask_store.lineage import cleaned, everything_from, take_down, tombstones
from data_engine.mask_store.store import Store
from data_engine.records import DrawnMask, Image, Model, Review, Shard, Submission, Task
from data_engine.tasks import Conflict, Desk


@pytest.fixture
def worked(desk: Desk) -> Store:
    """Round 1: a and b are labelled, a looked at again; both in a shard; models m1 < m2; m0 saw neither."""
    store = desk.store
    for name in "ab":
        desk.add_tasks([Task(id=f"t-{name}", round=1, stage="assisted", image_id=name)])
        task = desk.next_task("anna")
        assert task is not None
        mask = DrawnMask(rle=square())
        desk.submit(
            Submission(submission_id=f"s-{name}", task_id=task.id, version=1, masks=(mask,)), "anna"
        )
    desk.add_tasks([Task(id="t-a2", round=2, stage="semi_automatic", image_id="a")])
    store.add_reviews(
        Review(
            id=f"r-{name}",
            round=3,
            image_id=name,
            annotator="ben",
            before_id=f"s-{name}/0",
            before=square(),
            after=None,
            iou=0.0,
        )
        for name in "ab"
    )
    for path, round_, images in (("1.tar", 1, "ab"), ("2.tar", 4, "b")):
        shard = Shard(
            path=path, round=round_, source="assisted", num_images=2, num_masks=2, sha256=""
        )
        store.put_shard(shard, images)
    store.put_model(Model(id="m0", path="m0"))
    store.put_model(Model(id="m1", path="m1", parent="m0", round=1, trained_on=("1.tar",)))
    store.put_model(Model(id="m2", path="m2", parent="m1", round=2, trained_on=("2.tar",)))
    return store


def square() -> dict[str, object]:
    import numpy as np

    from sam_train.ops import rle

    mask = np.zeros((6, 8), bool)
    mask[1:3, 1:3] = True
    return rle.encode(mask)


def test_everything_from_an_image_is_named(worked: Store) -> None:
    found = everything_from(worked, "a")

    assert found.tasks == ("t-a", "t-a2")
    assert found.masks == ("s-a/0",)
    assert found.reviews == ("r-a",)
    assert found.rounds == (1, 2, 3)
    assert found.shards == ("1.tar",)
    assert found.models == ("m1", "m2")  # the second goes on from the first


def test_taking_an_image_down_removes_its_rows_and_no_others(
    worked: Store, image: Callable[..., Image]
) -> None:
    stone = take_down(worked, "a", reason="asked to", who="carla", now=5.0)

    assert (stone.shards, stone.models) == (("1.tar",), ("m1", "m2"))
    assert (stone.key, stone.reason, stone.who, stone.created_at) == ("a", "asked to", "carla", 5.0)
    left = everything_from(worked, "a")
    assert (left.tasks, left.masks, left.reviews, left.shards) == ((), (), (), ())
    other = everything_from(worked, "b")
    assert (other.tasks, other.masks, other.reviews) == (("t-b",), ("s-b/0",), ("r-b",))
    assert [found.id for found in worked.images()] == ["b", "c"]


def test_an_image_that_was_taken_down_is_not_registered_again(
    worked: Store, image: Callable[..., Image]
) -> None:
    take_down(worked, "a", reason="asked to", who="carla", now=5.0)

    assert worked.add_images([image("a"), image("d")]) == 1
    assert worked.taken_down(["a", "b"]) == {"a"}
    assert [found.id for found in worked.images()] == ["b", "c", "d"]


def test_work_on_an_image_that_was_taken_down_is_refused(worked: Store, desk: Desk) -> None:
    task = desk.next_task("anna")
    assert task is not None and task.image_id == "a"
    take_down(worked, "a", reason="asked to", who="carla", now=5.0)

    with pytest.raises(Conflict, match="taken down"):
        desk.submit(Submission(submission_id="s", task_id=task.id, version=1), "anna")
    assert desk.next_task("anna") is None


def test_what_is_left_to_clean_is_kept_until_it_is_clean(worked: Store) -> None:
    first = take_down(worked, "a", reason="asked to", who="carla", now=5.0)
    assert take_down(worked, "a", reason="again", who="dora", now=6.0) == first

    cleaned(worked, "a", ["1.tar", "m1"])

    (stone,) = tombstones(worked)
    assert (stone.shards, stone.models) == ((), ("m2",))


def test_an_unknown_image_cannot_be_taken_down(worked: Store) -> None:
    with pytest.raises(KeyError, match="no image x"):
        take_down(worked, "x", reason="", who="carla", now=5.0)
    with pytest.raises(KeyError, match="was taken down"):
        cleaned(worked, "b", [])
