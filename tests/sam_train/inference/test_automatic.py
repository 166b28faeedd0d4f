"""Automatic masks of a model whose answers are known: what each filter drops, and the command."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sam_train
from sam_train import cli, config
from sam_train.evaluation.threshold_tuning import ThresholdTuning
from sam_train.inference import mask_filters
from sam_train.inference.automatic import AutomaticSegmenter
from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from sam_train.inference.mask_windows import MaskUpscaler
from sam_train.models.sam import Sam
from sam_train.ops import rle
from sam_train.structures import Annotation, ImageRecord, MaskPrediction, Prompts

Discs = Callable[..., Sam]


@pytest.fixture
def discs(tiny_sam: Sam, monkeypatch: pytest.MonkeyPatch) -> Discs:
    """`discs(radii, ious)`: a model of 64 px that answers each click with discs round it."""
    tiny_sam.set_img_size(64)

    def build(
        radii: tuple[float, ...] = (4, 9, 99),
        ious: tuple[float, ...] = (0.9, 0.95, 0.5),
        *,
        slope: float = 40,
    ) -> Sam:
        side = tiny_sam.low_res_size
        cells = (torch.arange(side) + 0.5) * 64 / side

        def decode(features: Any, prompts: Prompts, **settings: Any) -> MaskPrediction:
            x, y = prompts.point_coords[:, :1, None].unbind(-1)
            distance = ((cells - x) ** 2 + (cells[:, None] - y) ** 2).sqrt()
            logits = slope * (torch.tensor(radii)[:, None, None] - distance[:, None])
            return MaskPrediction(logits, torch.tensor(ious).expand(len(logits), len(ious)))

        monkeypatch.setattr(tiny_sam, "decode", decode)
        return tiny_sam

    return build


def blank(height: int = 64, width: int = 64) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def test_it_is_public() -> None:
    assert sam_train.SamAutomaticMaskGenerator is SamAutomaticMaskGenerator


def test_every_candidate_is_accounted_for(discs: Discs) -> None:
    generator = SamAutomaticMaskGenerator(discs(), points_per_side=4)

    masks = generator.generate(blank())

    report = generator.report
    assert (report.points, report.candidates, report.low_predicted_iou) == (16, 48, 16)
    assert sum(report[2:]) == report.candidates
    assert report.kept == len(masks) == 32
    assert "16 low predicted iou" in str(report)
    for mask in masks:
        (x, y), (left, top, w, h) = mask["point_coords"][0], mask["bbox"]
        assert mask["segmentation"][int(y), int(x)]
        assert left <= x <= left + w and top <= y <= top + h
        assert mask["area"] == mask["segmentation"].sum()
        assert mask["crop_box"] == [0, 0, 64, 64]


def test_unsure_masks_are_never_brought_to_full_size(
    discs: Discs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    windows = MaskUpscaler.windows

    def watched(self: MaskUpscaler, *args: Any) -> Iterator[Any]:
        for own in windows(self, *args):
            seen.append(own.logits.shape)
            yield own

    monkeypatch.setattr(MaskUpscaler, "windows", watched)
    monkeypatch.setattr(mask_filters, "MAX_LOGITS", 2000)
    SamAutomaticMaskGenerator(discs(), points_per_side=4).generate(blank())

    assert sum(shape[0] for shape in seen) == 32
    assert max(shape.numel() for shape in seen) <= 2000
    assert sum(shape.numel() for shape in seen) < 0.3 * 32 * 64**2, "only where a mask can be"


def test_an_empty_result_explains_itself(discs: Discs, caplog: pytest.LogCaptureFixture) -> None:
    model = discs(slope=0.1)  # a unit of logit is ten pixels
    segmenter = AutomaticSegmenter(model, lambda model: SamAutomaticMaskGenerator(model, 4))

    with caplog.at_level(logging.WARNING):
        assert segmenter.segment(blank()) == []

    assert "no mask was found" in caplog.text and "low stability" in caplog.text
    assert "tune=true" in caplog.text


def test_thresholds_are_not_blamed_for_what_other_filters_drop(
    discs: Discs, caplog: pytest.LogCaptureFixture
) -> None:
    model = discs((99, 99), (0.95, 0.95))
    segmenter = AutomaticSegmenter(
        model, lambda model: SamAutomaticMaskGenerator(model, 4, max_mask_area_fraction=0.95)
    )

    with caplog.at_level(logging.WARNING):
        assert segmenter.segment(blank()) == []

    assert "too large" in caplog.text and "tune=true" not in caplog.text


def test_the_sa_1b_preset_drops_what_the_paper_drops(discs: Discs) -> None:
    preset = config.instantiate(config.compose("segment", ["preset=sa1b"]).preset)
    generator = preset(model=discs((5, 60, 99), (0.95, 0.95, 0.95)), points_per_side=8)

    masks = generator.generate(blank(400, 400))

    report = generator.report
    assert report.candidates == 3 * (8**2 + 4 * 4**2 + 16 * 2**2)
    assert report.too_large and report.at_crop_edge and report.duplicates_in_crop
    assert {mask["crop_box"][2] for mask in masks} > {400}, "crops of several layers"
    assert max(mask["area"] for mask in masks) < 0.95 * 400**2
    assert min(mask["area"] for mask in masks) >= 100


def test_masks_under_the_least_area_are_dropped_or_stay(discs: Discs) -> None:
    settings: dict[str, Any] = {"points_per_side": 4, "min_mask_region_area": 100}
    kept = SamAutomaticMaskGenerator(discs(), **settings)
    dropping = SamAutomaticMaskGenerator(discs(), **settings, drop_small_masks=True)

    assert len(kept.generate(blank())) == 32
    assert len(dropping.generate(blank())) == 16
    assert dropping.report.too_small == 16


@pytest.mark.parametrize("mode", ["binary_mask", "uncompressed_rle", "coco_rle"])
def test_output_modes_hold_the_same_masks(discs: Discs, mode: str) -> None:
    generator = SamAutomaticMaskGenerator(discs(), 4, output_mode=mode)

    (first, *_), records = generator.generate(blank()), generator.annotations(blank())

    found = first["segmentation"]
    mask = found if mode == "binary_mask" else rle.decode(found)
    np.testing.assert_array_equal(mask, rle.decode(records[0].rle))
    x, y, w, h = first["bbox"]
    assert records[0].bbox == (x, y, w + 1, h + 1), "files have edges, dicts have last pixels"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": None}, "Exactly one of points_per_side"),
        ({"output_mode": "png"}, "output_mode is one of"),
        ({"points_per_batch": 0}, "points_per_batch is 1 or more"),
        ({"crop_n_layers": 3, "crop_n_points_downscale_factor": 4}, "leaves no point"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tiny_sam: Sam, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SamAutomaticMaskGenerator(tiny_sam, **settings)


@pytest.mark.parametrize(
    ("grids", "words"),
    [
        (
            [[[0.5, 0.5], [1.2, 0.5], [0.5, -0.1]]],
            "2 of its 3 points are not, the first (1.2, 0.5)",
        ),
        ([[[320, 240]]], "shares of the width and the height and not pixels"),
        ([[[float("nan"), 0.5]]], "1 of its 1 points are not, the first (nan, 0.5)"),
        (
            [[0.5, 0.5]],
            r"point_grids[0] is an (N, 2) array of (x, y) from 0 to 1, got the shape (2,)",
        ),
        ([np.full((4, 3), 0.5)], "got the shape (4, 3)"),
        ([[[0.5, 0.5], [0.5]]], "no array of numbers"),
        ([[["left", "top"]]], "no array of numbers"),
        ([], "one for each of the 1 layers of crops, got 0"),
    ],
)
def test_grids_of_what_is_no_point_of_the_image_are_refused(
    tiny_sam: Sam, grids: Any, words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        SamAutomaticMaskGenerator(tiny_sam, None, point_grids=grids)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_grid_is_asked_at_its_points_borders_and_none_included(discs: Discs) -> None:
    grid = np.array([[0, 0], [0.25, 0.5], [1, 1]])
    generator = SamAutomaticMaskGenerator(
        discs((9,), (0.9,)), None, point_grids=[grid, np.zeros((0, 2))], crop_n_layers=1
    )

    masks = generator.generate(blank(32, 64))

    assert sorted(mask["point_coords"][0] for mask in masks) == [[0, 0], [16, 16], [64, 32]]
    assert generator.report.points == 3, "none is asked in the crops"


def test_a_large_image_is_tiled_with_masks_where_they_belong(discs: Discs) -> None:
    def build(model: Sam) -> SamAutomaticMaskGenerator:
        return SamAutomaticMaskGenerator(model, 4)

    model = discs((9,), (0.95,))
    segmenter = AutomaticSegmenter(model, build, tile_px=400, tile_overlap_px=150)

    found = segmenter.segment(blank(500, 900))

    assert segmenter.report.kept == len(found) > 16
    assert segmenter.report.cut_by_tile
    for annotation in found:
        assert annotation.point_coords is not None
        (x, y), mask = annotation.point_coords[0], rle.decode(annotation.rle)
        assert mask.shape == (500, 900) and mask[int(y), int(x)]


class Squares:
    """Three images with 16 objects each, the discs that `discs` finds."""

    def records(self, **settings: Any) -> Any:
        y, x = np.mgrid[:64, :64] + 0.5
        for number in range(3):
            objects = []
            for i in range(16):
                centre = 8 + 16 * (i % 4), 8 + 16 * (i // 4)
                mask = rle.encode((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 8.5**2)
                own = Annotation(id=i, rle=mask, bbox=rle.bbox(mask), area=rle.area(mask))
                objects.append(own)
            yield ImageRecord(str(number), (64, 64), tuple(objects), blank)


def test_tuning_finds_thresholds_that_leave_the_true_masks(discs: Discs, tmp_path: Path) -> None:
    model = discs((4, 9, 15), (0.6, 0.4, 0.2), slope=9)
    source: Any = Squares()
    tuning = ThresholdTuning(generator=lambda model: SamAutomaticMaskGenerator(model, 4))

    tuned = tuning.run(model, source, tmp_path / "tuning.json")

    assert tuned.current.recall == 0 and tuned.best.recall == 1
    assert 0.2 <= tuned.best.pred_iou_thresh < 0.4, "the largest discs are none of the objects"
    assert tuned.best.masks_per_image == 16, "the smallest are not, and are the less stable ones"
    assert "Use preset.pred_iou_thresh=0." in str(tuned)
    best = tuned.best
    thresholds = best.pred_iou_thresh, best.stability_score_thresh
    generator = SamAutomaticMaskGenerator(model, 4, 64, *thresholds)
    assert len(generator.generate(blank())) == 16
    assert json.loads((tmp_path / "tuning.json").read_text())["best"]["recall"] == 1


def test_the_commands_run(
    tmp_path: Path, tiny_sam_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "images/a.png")
    all_pass = "pred_iou_thresh: 0, stability_score_thresh: 0, points_per_side: 3".split(", ")
    common = [f"checkpoint={tiny_sam_file}", f"run_dir={tmp_path}/run"]
    settings = [f"preset.{own.replace(': ', '=')}" for own in all_pass]
    segment = [*common, "mode=automatic", "img_size=64", *settings]
    images = f"images={tmp_path}/images"

    assert cli.run("segment", [*segment, images]) == 0
    assert "9 points gave 27 candidates" in capsys.readouterr().out
    data = json.loads((tmp_path / "run/masks/a.json").read_text())
    assert data["annotations"] and "crop_box" in data["annotations"][0]
    assert cli.run("segment", [*segment, images]) == 0
    assert "1 images were done before" in capsys.readouterr().out
    small = ["data=synthetic", "data.val.size=64", "data.val.num_scenes=2"]
    tune = ["tune=true", *small, "tuning.max_images=1"]
    assert cli.run("segment", [*segment, *tune]) in (0, 2)
    printed = capsys.readouterr()
    assert "preset.pred_iou_thresh" in printed.out or "finds none of the" in printed.err
    assert cli.run("segment", [*common, "mode=points", images, "tune=true"]) == 2
    assert "tune=true wants mode=automatic data=NAME" in capsys.readouterr().err
    settings = [f"protocol.generator.{own.replace(': ', '=')}" for own in all_pass]
    evaluation = ["protocol=proposals", *small, *settings, "protocol.max_images=1"]
    assert cli.run("eval", [*common, *evaluation]) == 0
    result = json.loads(next((tmp_path / "run/eval").rglob("metrics.json")).read_text())
    assert result["protocol"] == "proposals" and result["num_images"] == 1
    assert {"average_recall@10", "average_recall@100", "average_recall@1000"} <= set(
        result["metrics"]
    )
