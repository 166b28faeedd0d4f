"""SamAutomaticMaskGenerator beside segment_anything's own, on the same weights: the same masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch

from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from sam_train.inference.crops import point_grid
from sam_train.ops import rle

TOLERANCE = 1e-4


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
        assert type(ours["area"]) is type(theirs["area"]) is int
    assert differing <= len(got) / 50


def real_masks(pair: Any, image: np.ndarray) -> dict[str, float]:
    """Cuts the logits of random weights so high that masks are of many places and sizes.

    Returns:
        Thresholds that about half of them pass.
    """
    predictor = pair.published
    for each in pair:  # no threshold of 0 or less is one
        with torch.no_grad():
            each.model.mask_decoder.iou_prediction_head.layers[-1].bias += 3
    predictor.set_image(image)
    coords = predictor.transform.apply_coords(point_grid(4) * image.shape[1::-1], image.shape[:2])
    points = torch.as_tensor(coords)[:, None], torch.ones(len(coords), 1)
    logits, ious, _ = predictor.predict_torch(*points, return_logits=True)
    cut = float(logits[..., ::5, ::5].quantile(0.985))
    for each in pair:
        each.model.mask_threshold = cut
    offset = float(logits.std()) / 50
    areas = [(logits > cut + own).sum((2, 3)) for own in (offset, -offset)]
    return {
        "pred_iou_thresh": float(ious.flatten().quantile(0.3)),
        "stability_score_thresh": float((areas[0] / areas[1]).flatten().nanquantile(0.3)),
        "stability_score_offset": offset,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"points_per_side": 16},
        {"points_per_side": 12, "points_per_batch": 7, "output_mode": "uncompressed_rle"},
        {"points_per_side": 12, "crop_n_layers": 1, "output_mode": "coco_rle"},
        {"points_per_side": 12, "min_mask_region_area": 60},
    ],
    ids=["defaults", "small batches", "crops", "mended"],
)
@pytest.mark.parametrize("name", ["nuclei", "coco_panoptic"])
def test_masks_are_those_of_segment_anything(
    pair: Any, real_images: Callable[..., list[np.ndarray]], name: str, settings: dict[str, Any]
) -> None:
    image = real_images(name, 1)[0][:240, :320]
    settings = real_masks(pair, image) | settings
    nms = {"box_nms_thresh": 0.9, "crop_nms_thresh": 0.9}
    theirs = segment_anything.SamAutomaticMaskGenerator(pair.published.model, **nms, **settings)
    ours = SamAutomaticMaskGenerator(pair.ours.model, **nms, **settings)

    expected, got = theirs.generate(image), ours.generate(image)

    print(name, settings, len(expected), ours.report)
    assert len(expected) >= 50
    assert_same(got, expected)
    report = ours.report
    assert report.low_predicted_iou and report.low_stability and report.duplicates_in_crop
    assert sum(report[2:]) == report.candidates
