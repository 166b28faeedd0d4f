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
NOISE = 1.5


def pixels(segmentation: Any) -> np.ndarray:
    return segmentation if isinstance(segmentation, np.ndarray) else rle.decode(segmentation)


def asked_at(mask: dict[str, Any]) -> tuple[Any, ...]:
    return mask["crop_box"], mask["point_coords"], mask["predicted_iou"]


def assert_same(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same masks in the same order, but for single pixels of few, whose logit is at the threshold."""
    assert len(got) == len(expected)
    ranks = [[mask["predicted_iou"] for mask in masks] for masks in (got, expected)]
    np.testing.assert_allclose(*ranks, rtol=0, atol=TOLERANCE)
    # Masks of equal predicted IoU may come in either order.
    got, expected = (sorted(masks, key=asked_at) for masks in (got, expected))
    differing = 0
    for ours, theirs in zip(got, expected, strict=True):
        assert list(ours) == list(theirs)
        differing += int((pixels(ours["segmentation"]) ^ pixels(theirs["segmentation"])).sum())
        for name in ("bbox", "point_coords", "crop_box"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-9)
            assert type(ours[name][0]) is type(theirs[name][0])
        np.testing.assert_allclose(
            ours["predicted_iou"], theirs["predicted_iou"], rtol=0, atol=TOLERANCE
        )
        # Of its two cuts, too, a pixel or two may fall to the other side.
        stability = ours["stability_score"], theirs["stability_score"]
        np.testing.assert_allclose(*stability, rtol=0, atol=2 / theirs["area"])
        differing += stability[0] != stability[1]
        assert type(ours["area"]) is type(theirs["area"]) is int
    assert differing <= len(got) / 10


RADII_PX = torch.tensor([9.0, 17, 40])
"""Of the three candidates, in the 128 px of the model input."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The published prompt encoder draws its frequencies."""
    torch.manual_seed(0)


@pytest.fixture
def blobs(pair: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pair, its random masks drawn together round the clicks, in both in the same way.

    The masks of random weights hang so little on the click that nearly all are one mask.
    """
    asked: list[torch.Tensor] = []
    theirs, ours = pair.published.model, pair.ours.model
    embed = ours.prompt_encoder.embed_unread

    def hear(module: Any, args: Any, kwargs: Any) -> None:
        asked.append(kwargs["points"][0])

    def hear_ours(prompts: Any) -> Any:
        asked.append(prompts.point_coords)
        return embed(prompts)

    def draw_together(module: Any, args: Any, output: Any) -> Any:
        logits, ious = output
        cells = (torch.arange(logits.shape[-1]) + 0.5) * 128 / logits.shape[-1]
        x, y = asked.pop()[:, :1].float().unbind(-1)
        distance = ((cells - x[..., None]) ** 2 + (cells[:, None] - y[..., None]) ** 2).sqrt()
        spread = (RADII_PX[:, None, None] - distance[:, None]) / 3
        return spread + logits * NOISE / logits.std((2, 3), keepdim=True), ious + 3

    theirs.prompt_encoder.register_forward_pre_hook(hear, with_kwargs=True)
    monkeypatch.setattr(ours.prompt_encoder, "embed_unread", hear_ours)
    for model in (theirs, ours):
        model.mask_decoder.register_forward_hook(draw_together)
    return pair


def thresholds(pair: Any, image: np.ndarray) -> dict[str, float]:
    """What most masks pass, and some do not."""
    predictor = pair.published
    predictor.set_image(image)
    coords = predictor.transform.apply_coords(point_grid(4) * image.shape[1::-1], image.shape[:2])
    points = torch.as_tensor(coords)[:, None], torch.ones(len(coords), 1)
    logits, ious, _ = predictor.predict_torch(*points, return_logits=True)
    areas = [(logits > own).sum((2, 3)) for own in (1.0, -1.0)]
    return {
        "pred_iou_thresh": float(ious.flatten().quantile(0.15)),
        "stability_score_thresh": float((areas[0] / areas[1]).flatten().nanquantile(0.2)),
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
    blobs: Any, real_images: Callable[..., list[np.ndarray]], name: str, settings: dict[str, Any]
) -> None:
    image = real_images(name, 1)[0][:240, :320]
    settings = thresholds(blobs, image) | settings
    theirs = segment_anything.SamAutomaticMaskGenerator(blobs.published.model, **settings)
    ours = SamAutomaticMaskGenerator(blobs.ours.model, **settings)

    expected, got = theirs.generate(image), ours.generate(image)

    assert len(expected) >= 50, str(ours.report)
    assert_same(got, expected)
    report = ours.report
    assert report.low_predicted_iou and report.low_stability and report.duplicates_in_crop
    assert sum(report[2:]) == report.candidates
