"""Which images a round may take."""

from __future__ import annotations

from collections.abc import Callable

from data_engine.mask_store.store import Store
from data_engine.records import Image, Shard, Task
from data_engine.tasks import Desk


def untouched(store: Store, before_round: int) -> list[str]:
    return [image.id for image in store.untouched_images(before_round=before_round)]


def test_images_of_earlier_rounds_and_held_out_ones_are_not_taken_again(
    desk: Desk, image: Callable[..., Image]
) -> None:
    store = desk.store
    store.add_images([image("d", held_out=True), image("e")])
    desk.add_tasks([Task(id="t", round=1, stage="assisted", image_id="a")])
    shard = Shard(path="s", round=2, source="automatic", num_images=1, num_masks=0, sha256="")
    store.put_shard(shard, ["b"])

    # A round that is called again finds its own images again.
    assert untouched(store, 1) == ["a", "b", "c", "e"]
    assert untouched(store, 2) == ["b", "c", "e"]
    assert untouched(store, 3) == ["c", "e"]


def test_an_image_whose_task_was_withdrawn_is_free(desk: Desk) -> None:
    desk.add_tasks([Task(id="t", round=1, stage="assisted", image_id="a")])
    desk.withdraw(["t"])

    assert untouched(desk.store, 2) == ["a", "b", "c"]
