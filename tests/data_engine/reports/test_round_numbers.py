"""Rounds counted: who made what, at what cost."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from data_engine.round_numbers import RoundNumbers, called, round_numbers


def numbers(engine: Any, number: int) -> RoundNumbers:
    round_ = engine.store.round(number)
    assert round_ is not None
    return round_numbers(engine.store, engine.root, round_)


def test_what_was_drawn_from_nothing_is_counted_with_its_seconds_and_clicks(scenes: Any) -> None:
    scenes.assisted(1, scenes.images, ["anna", "ben"])

    found = numbers(scenes, 1)

    objects = [scenes.truth[own.key] for own in scenes.images]
    clicks = [1 + i % 3 for own in objects for i in range(len(own))]
    assert (found.num_images, found.num_masks) == (4, len(clicks))
    assert found.masks_per_image == len(clicks) / 4
    assert found.clicks_per_mask == pytest.approx(np.mean(clicks))
    assert found.seconds_per_mask == pytest.approx(np.mean(clicks) * 2 + 1)
    # Besides the masks, 3 s an image.
    all_in = sum(clicks) * 2 + len(clicks) + 4 * 3
    assert found.seconds_per_mask_all_in == pytest.approx(all_in / len(clicks))
    assert found.share_automatic == 0
    assert found.work is not None
    assert found.work.annotators == ("anna", "ben")
    assert found.work.events == {"look": 4, "click": sum(clicks), "accept": len(clicks)}
    assert not found.is_simulated


def test_figures_of_people_and_simulated_annotators_together_are_called_so() -> None:
    assert called(("anna", "ben")) == called(()) == ""
    assert called(("simulated-0", "simulated-1")) == "simulated "
    assert called(("anna", "simulated-0")) == "partly simulated "


def test_of_ready_made_masks_those_passed_corrected_and_struck_out_are_told_apart(
    scenes: Any,
) -> None:
    scenes.semi_automatic(1, scenes.images, "simulated-0")

    found = numbers(scenes, 1)

    kinds: Counter[str] = Counter()
    for own in scenes.images:
        num = len(scenes.truth[own.key])
        num_shown = sum(i % 4 < 3 for i in range(num))
        kinds["drawn"] += num - num_shown
        kinds.update(("passed", "corrected", "struck out")[i % 3] for i in range(num_shown))
    work = found.work
    assert work is not None
    assert work.num_drawn == kinds["drawn"] > 0
    assert work.num_passed == kinds["passed"] > 0
    assert work.num_corrected == kinds["corrected"] > 0
    assert work.num_struck_out == kinds["struck out"] > 0
    assert found.num_masks == kinds["drawn"] + kinds["passed"] + kinds["corrected"]
    assert found.share_automatic == pytest.approx(kinds["passed"] / found.num_masks)
    # Those that were passed are not in the mean: a drawn mask takes 3 s, a corrected one 5.
    num_made = kinds["drawn"] + kinds["corrected"]
    expected = (3 * kinds["drawn"] + 5 * kinds["corrected"]) / num_made
    assert found.seconds_per_mask == pytest.approx(expected)
    assert found.is_simulated


def test_an_automatic_round_is_counted_from_its_shards_and_manifests(scenes: Any) -> None:
    manifests = scenes.automatic(1, scenes.images)

    found = numbers(scenes, 1)

    assert found.num_images == 4
    assert found.num_masks == sum(own.masks for own in manifests) > 0
    assert found.share_automatic == 1
    assert found.seconds_per_mask is None and found.work is None
    assert found.rejects["candidates"] == sum(own.rejects["candidates"] for own in manifests) > 0
    assert found.rejects["kept"] == found.num_masks
    assert found.missing == ()


def test_a_damaged_shard_is_named_and_the_others_are_counted(scenes: Any) -> None:
    manifests = scenes.automatic(1, scenes.images)
    shard = scenes.shards(1)[0]
    shard.write_bytes(shard.read_bytes()[:-512])

    found = numbers(scenes, 1)

    assert found.missing == (shard.relative_to(scenes.root).as_posix(),)
    assert found.rejects["kept"] == manifests[1].masks
    assert found.num_masks == sum(own.masks for own in manifests)


def test_a_round_that_nobody_has_begun_has_no_means(scenes: Any) -> None:
    scenes.assisted(1, [], ["anna"])

    found = numbers(scenes, 1)

    assert (found.num_images, found.num_masks) == (0, 0)
    assert found.masks_per_image is found.share_automatic is found.seconds_per_mask is None
    assert json.dumps(found.round.config)
