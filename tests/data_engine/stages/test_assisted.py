"""Images of the first stage come in a useful order, each as one task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from data_engine.image_finding import find_images
from data_engine.images import register
from data_engine.mask_store.lineage import take_down
from data_engine.mask_store.store import Store
from data_engine.records import Image
from data_engine.stages.assisted import AssistedStage, assisted_tasks, priority
from sam_train import config
from sam_train.inference.predictor import SamPredictor
from sam_train.models.sam import Sam
from sam_train.structures import ImageRecord


@pytest.fixture
def images(store: Store, tmp_path: Path) -> dict[str, Image]:
    """Squares on black: large and bright, small and bright, small and dim."""
    for name, (side, level) in {"large": (60, 200), "small": (20, 200), "dim": (20, 40)}.items():
        pixels = np.zeros((128, 128, 3), np.uint8)
        pixels[20 : 20 + side, 30 : 30 + side] = level
        Pillow.fromarray(pixels).save(tmp_path / f"{name}.png")
    register(store, find_images(str(tmp_path)))
    return {image.key: image for image in store.images()}


def test_images_with_a_large_outstanding_object_go_first(
    store: Store, images: dict[str, Image]
) -> None:
    tasks = assisted_tasks(store, 1, list(images.values()), "prominence")

    order = [task.image_id for task in sorted(tasks, key=lambda task: -task.priority)]
    assert order == [images[name].id for name in ("large", "small", "dim")]
    assert {task.payload["move_on_after_s"] for task in tasks} == {30.0}
    assert len({task.id for task in tasks}) == 3


def test_tasks_made_again_are_the_same(store: Store, images: dict[str, Image]) -> None:
    chosen = list(images.values())

    assert assisted_tasks(store, 1, chosen) == assisted_tasks(store, 1, chosen)


def test_images_that_the_model_is_less_sure_of_go_first(
    built_in_sam: Sam, synthetic_scenes: Sequence[ImageRecord]
) -> None:
    predictor = SamPredictor(built_in_sam)
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)

    sure, unsure = (
        priority(pixels, "uncertainty", predictor) for pixels in (synthetic_scenes[0].image, noise)
    )

    assert 0 < sure < unsure < 1


def test_an_image_taken_down_meanwhile_gets_no_task_and_a_held_out_one_is_refused(
    store: Store, images: dict[str, Image]
) -> None:
    take_down(store, images["dim"].id, reason="asked", who="anna", now=0.0)

    tasks = assisted_tasks(store, 1, list(images.values()))

    assert {task.image_id for task in tasks} == {images["large"].id, images["small"].id}
    with pytest.raises(ValueError, match="held out"):
        assisted_tasks(store, 1, [replace(images["large"], held_out=True)])


def test_what_is_no_queue_or_lacks_a_model_is_refused(
    store: Store, images: dict[str, Image]
) -> None:
    with pytest.raises(ValueError, match="prominence, uncertainty, got 'size'"):
        assisted_tasks(store, 1, [], "size")
    with pytest.raises(ValueError, match="a predictor"):
        assisted_tasks(store, 1, list(images.values()), "uncertainty")


def test_the_packaged_node_builds_the_stage(compose: Callable[..., object]) -> None:
    cfg = config.compose("segment", ["images=none", "+stage=assisted"])

    assert config.instantiate(cfg.stage) == AssistedStage()
