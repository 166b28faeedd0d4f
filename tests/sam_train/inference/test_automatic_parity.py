"""SamAutomaticMaskGenerator beside segment_anything's own, on the same weights: the same masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch

from sam_train.checkpoints.load import load_model
from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from sam_train.ops import rle

TOLERANCE = 1e-4


@pytest.fixture
def generators(balanced_sam: Any, tmp_path: Any) -> Callable[..., tuple[Any, Any]]:
    """The published generator and ours with the same random weights and the same settings."""
    torch.save(balanced_sam.state_dict(), tmp_path / "official.pth")
    ours = load_model(tmp_path / "official.pth")

    def build(**settings: Any) -> tuple[Any, SamAutomaticMaskGenerator]:
        return (
            segment_anything.SamAutomaticMaskGenerator(balanced_sam, **settings),
            SamAutomaticMaskGenerator(ours, **settings),
        )

    return build


def pixels(segmentation: Any) -> np.ndarray:
    return segmentation if isinstance(segmentation, np.ndarray) else rle.decode(segmentation)


def assert_same(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same masks in the same order, but for a pixel of one where its logit is at the threshold."""
    assert len(got) == len(expected)
    differing = 0
    for ours, theirs in zip(got, expected, strict=True):
        assert list(ours) == list(theirs)
        differing += int((pixels(ours["segmentation"]) ^ pixels(theirs["segmentation"])).sum())
        for name in ("bbox", "point_coords", "crop_box"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-9)
            assert type(ours[name][0]) is type(theirs[name][0])
        for name in ("predicted_iou", "stability_score"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=TOLERANCE)
    assert differing <= len(got) / 50


def thresholds(generators: Callable[..., Any], image: np.ndarray) -> dict[str, float]:
    """What half of this model's masks pass."""
    theirs, _ = generators(pred_iou_thresh=-9, stability_score_thresh=-1, box_nms_thresh=2)
    masks = theirs.generate(image)
    ious, stability = (
        [mask[name] for mask in masks] for name in ("predicted_iou", "stability_score")
    )
    return {
        "pred_iou_thresh": float(np.quantile(ious, 0.3)),
        "stability_score_thresh": float(np.quantile(stability, 0.3)),
    }


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"points_per_side": 16}, 50),
        ({"points_per_side": 16, "points_per_batch": 7, "output_mode": "uncompressed_rle"}, 50),
        ({"points_per_side": 12, "crop_n_layers": 1, "output_mode": "coco_rle"}, 50),
        ({"points_per_side": 12, "min_mask_region_area": 100}, 50),
    ],
    ids=["defaults", "small batches", "crops", "mended"],
)
@pytest.mark.parametrize("name", ["nuclei", "coco_panoptic"])
def test_masks_are_those_of_segment_anything(
    generators: Callable[..., Any],
    real_images: Callable[..., list[np.ndarray]],
    name: str,
    settings: dict[str, Any],
    least: int,
) -> None:
    (image,) = real_images(name, 1)
    settings = {"box_nms_thresh": 0.95, "crop_nms_thresh": 0.95} | settings
    theirs, ours = generators(**thresholds(generators, image), **settings)

    expected, got = theirs.generate(image), ours.generate(image)

    assert len(expected) >= least
    assert_same(got, expected)
