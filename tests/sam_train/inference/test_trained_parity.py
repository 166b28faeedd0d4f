"""Beside segment_anything on weights that were trained here and left in the official format: real masks.

`weights/vit_tiny_nuclei.pth` is what `sam-export format=official` made of a run of
`experiment=vit_tiny_nuclei`, in half precision to be small.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch

from sam_train.checkpoints.load import load_model
from sam_train.data.synthetic import make_scene
from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from sam_train.inference.predictor import SamPredictor

from .test_automatic_parity import assert_same

WEIGHTS = Path(__file__).parent / "weights" / "vit_tiny_nuclei.pth"
TOLERANCE = 1e-4
# Near the threshold a rounding error decides.
UNSURE_LOGIT = 1e-3


@pytest.fixture
def trained(published_sam: Callable[..., Any], tmp_path: Path) -> tuple[Any, SamPredictor]:
    """Both predictors."""
    state = {k: v.float() for k, v in torch.load(WEIGHTS, weights_only=True).items()}
    published = published_sam(
        img_size=256,
        embed_dim=128,
        depth=6,
        num_heads=4,
        mlp_ratio=3.0,
        global_attn_indexes=(2, 5),
        window_size=8,
        out_chans=128,
        iou_head_depth=3,
        iou_head_hidden_dim=128,
        mlp_dim=256,
    )
    published.load_state_dict(state)
    torch.save(state, tmp_path / "official.pth")
    return segment_anything.SamPredictor(published), SamPredictor(
        load_model(tmp_path / "official.pth")
    )


def images(real_images: Callable[..., list[np.ndarray]], name: str) -> list[np.ndarray]:
    if name == "scenes":
        return [make_scene(np.random.default_rng(seed), (200, 280))[0] for seed in range(2)]
    return real_images(name, 2)


PROMPTS: dict[str, dict[str, Any]] = {
    "point": {"point_coords": np.array([[70, 60]]), "point_labels": np.array([1])},
    "points": {
        "point_coords": np.array([[70, 60], [30, 90], [110.5, 40]]),
        "point_labels": np.array([1, 0, 1]),
        "multimask_output": False,
    },
    "box": {"box": np.array([40, 30, 120, 100]), "multimask_output": False},
    "both": {
        "point_coords": np.array([[70, 60], [90, 40]]),
        "point_labels": np.array([1, 0]),
        "box": np.array([40, 30, 120, 100]),
    },
}


@pytest.mark.parametrize("name", ["scenes", "nuclei", "coco_panoptic"])
def test_answers_are_those_of_segment_anything(
    trained: Any, real_images: Callable[..., list[np.ndarray]], name: str
) -> None:
    theirs, ours = trained
    is_filled = []
    for image in images(real_images, name):
        theirs.set_image(image)
        ours.set_image(image)
        for prompt in PROMPTS.values():
            expected, got = theirs.predict(**prompt), ours.predict(**prompt)
            np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(got[2], expected[2], rtol=0, atol=TOLERANCE)
            refined = {**prompt, "mask_input": expected[2][:1], "multimask_output": False}
            logits = theirs.predict(**refined, return_logits=True)[0]
            masks = ours.predict(**refined)[0]
            is_sure = abs(logits) > UNSURE_LOGIT
            np.testing.assert_array_equal(masks[is_sure], (logits > 0)[is_sure])
            is_filled.append(0 < masks.mean() < 1)
    assert np.mean(is_filled) > 0.5, "real masks are neither empty nor full"


@pytest.mark.parametrize("name", ["scenes", "nuclei", "coco_panoptic"])
def test_automatic_masks_are_those_of_segment_anything(
    trained: Any, real_images: Callable[..., list[np.ndarray]], name: str
) -> None:
    theirs, ours = trained
    settings = {
        "points_per_side": 24,
        "pred_iou_thresh": 0.2,
        "stability_score_thresh": 0.5,
        "crop_n_layers": 1,
        "crop_n_points_downscale_factor": 2,
        "min_mask_region_area": 9,
    }
    for image in images(real_images, name):
        generator = SamAutomaticMaskGenerator(ours.model, **settings)
        got = generator.generate(image)
        assert len(got) >= 50, str(generator.report)
        published = segment_anything.SamAutomaticMaskGenerator(theirs.model, **settings)
        expected = published.generate(image)
        for mask in expected:
            # Theirs are floats, of whole numbers, where a batch of points or a crop left no mask.
            mask["bbox"] = [int(x) for x in mask["bbox"]]
        assert_same(got, expected)
