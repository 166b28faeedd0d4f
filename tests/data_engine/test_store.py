"""What goes into the store comes out, once, in an order that both databases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from data_engine.mask_store.claims import StoreClaims
from data_engine.mask_store.store import Store
from data_engine.records import Image, Model, Review, Round, Shard

RLE = {"size": [6, 8], "counts": "12200000O"}


def test_records_come_out_as_they_went_in(store: Store, image: Callable[..., Image]) -> None:
    picture = image("a", member="a.jpg", offset=2**40, held_out=True, created_at=1.5)
    round_ = Round(number=2, stage="assisted", state="open", plan_step=1, config={"x": [1, None]})
    model = Model(id="m", path="m.ckpt", trained_on=("s.tar",), metrics={"mean_iou@1": 0.5})
    review = Review(
        id="r",
        round=2,
        image_id="a",
        annotator="anna",
        before_id="m1",
        before=RLE,
        after=None,
        iou=0.0,
    )
    shard = Shard(path="s.tar", round=2, source="automatic", num_images=1, num_masks=3, sha256="ff")

    store.add_images([picture])
    store.put_round(round_)
    store.put_model(model)
    store.add_reviews([review])
    store.put_shard(shard, ["a"])

    assert store.image("a") == picture
    assert store.round(2) == round_ and store.rounds() == [round_]
    assert store.model("m") == model and store.models() == [model]
    assert store.reviews(round=2) == [review] and store.reviews(round=1) == []
    assert store.shards(source="automatic") == [shard]


def test_putting_overwrites_and_adding_does_not(store: Store, image: Callable[..., Image]) -> None:
    round_ = Round(number=1, stage="assisted", state="open", plan_step=0)
    store.put_round(round_)
    store.put_round(replace(round_, state="done", finished_at=9.0))

    assert store.add_images([image("a"), image("b")]) == 2
    assert store.add_images([image("a", width=99), image("c")]) == 1

    assert store.rounds() == [replace(round_, state="done", finished_at=9.0)]
    assert store.image("a").width == 8


def test_names_are_ordered_by_bytes(store: Store, image: Callable[..., Image]) -> None:
    store.add_images(image(name) for name in ("b", "ä", "B", "a", "_"))

    assert [found.id for found in store.images()] == ["B", "_", "a", "b", "ä"]


def test_more_images_than_one_statement_takes_are_stored_and_found(
    store: Store, image: Callable[..., Image]
) -> None:
    names = [f"{number:04}" for number in range(1200)]
    assert store.add_images(image(name, held_out=name < "0100") for name in names) == 1200

    assert [found.id for found in store.images()] == names
    assert store.num_images(held_out=True) == 100 and store.num_images() == 1200
    assert set(store.images_by_id([*names, "unknown"])) == set(names)


def test_two_images_of_one_key_are_refused(store: Store, image: Callable[..., Image]) -> None:
    with pytest.raises(IntegrityError):
        store.add_images([image("a"), image("b", key="a")])

    assert store.num_images() == 0


def test_an_unknown_image_is_named(store: Store) -> None:
    with pytest.raises(KeyError, match="no image x"):
        store.image("x")


def test_a_transaction_that_fails_leaves_nothing(store: Store, image: Callable[..., Image]) -> None:
    def images() -> Any:
        yield image("a")
        raise RuntimeError("the source breaks off")

    with pytest.raises(RuntimeError):
        store.add_images(images())

    assert store.num_images() == 0


def test_one_worker_at_a_time_has_a_claim(store: Store, clock: Any) -> None:
    first, second = (
        StoreClaims(store, holder, clock=clock, lease_s=60) for holder in ("first", "second")
    )
    assert first.claim("000.tar")
    assert not second.claim("000.tar") and second.claim("001.tar")
    clock.now += 50
    assert first.claim("000.tar")  # keeps it longer
    clock.now += 50
    assert not second.claim("000.tar")
    second.release("000.tar")  # is not its own
    assert not second.claim("000.tar")
    clock.now += 60
    assert second.claim("000.tar") and not first.claim("000.tar")
    second.release("000.tar")
    assert first.claim("000.tar")


def test_contents_are_equal_but_for_times(store: Store, image: Callable[..., Image]) -> None:
    store.add_images([image("a", created_at=1.0)])
    before, before_all = store.contents(), store.contents(wall_clock=True)
    store.put_image(image("a", created_at=2.0))

    assert store.contents() == before
    assert store.contents(wall_clock=True) != before_all
