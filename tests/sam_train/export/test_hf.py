"""What `format=hf` writes, `transformers` loads, and answers alike from the raw pixels on."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamModel, SamProcessor

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.load import load_model
from sam_train.export.hf import HuggingFaceExport
from sam_train.ops.coords import preprocess_shape

TOLERANCE = 1e-4
POINTS, LABELS = [[40.0, 30.0], [10.0, 60.0]], [1, 0]


@pytest.fixture
def folder(official_file, tmp_path):
    """Our model with the toy weights, and the folder it was written to."""
    model = load_model(official_file[1])
    HuggingFaceExport().write(model, tmp_path / "hf")
    return model, tmp_path / "hf"


@pytest.fixture(params=["scene", "photograph"])
def pixels(request) -> np.ndarray:
    """(H, W, 3) uint8 of a made-up scene, or of a photograph where there is one at hand."""
    if request.param == "scene":
        scenes = request.getfixturevalue("synthetic_scenes")
        return np.array(scenes[0].image[:70])
    shards = request.getfixturevalue("shared_data") / "coco_panoptic"
    if not shards.is_dir():
        pytest.skip(f"no photographs at {shards}")
    with tarfile.open(shards / "val-000000.tar") as tar:
        name = next(name for name in tar.getnames() if name.endswith(".jpg"))
        file = tar.extractfile(name)
        assert file is not None
        return np.array(Image.open(io.BytesIO(file.read())).convert("RGB"))


def test_transformers_answers_alike_from_raw_pixels(folder, pixels, relative_error):
    model, path = folder
    original_size = pixels.shape[:2]
    height, width = preprocess_shape(*original_size, model.image_encoder.img_size)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    scale = torch.tensor([width / original_size[1], height / original_size[0]])
    entry = {
        "image": torch.from_numpy(np.array(resized)).permute(2, 0, 1),
        "original_size": original_size,
        "point_coords": torch.tensor([POINTS]) * scale,
        "point_labels": torch.tensor([LABELS]),
    }

    processor = SamProcessor.from_pretrained(path)
    theirs = SamModel.from_pretrained(path).eval()
    inputs = processor(
        pixels, input_points=[[POINTS]], input_labels=[[LABELS]], return_tensors="pt"
    )
    with torch.no_grad():
        got = theirs(
            pixel_values=inputs["pixel_values"],
            input_points=inputs["input_points"].float(),
            input_labels=inputs["input_labels"],
        )
        (expected,) = model([entry], True)

    assert inputs["reshaped_input_sizes"].tolist() == [[height, width]]
    masks = processor.image_processor.post_process_masks(
        got.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    # Pillow and torchvision resize to the same grey value or, rarely, to the next.
    difference = inputs["pixel_values"][0] - model.preprocess(entry["image"])
    assert difference.abs().max() < 1.01 / 57
    assert relative_error(got.iou_scores[0], expected["iou_predictions"]) < 0.02
    assert (masks[0][0] != expected["masks"][0]).float().mean() < 0.02
    with torch.no_grad():
        same_pixels = theirs(
            pixel_values=model.preprocess(entry["image"])[None],
            input_points=entry["point_coords"][None],
            input_labels=entry["point_labels"][None],
        )
    assert relative_error(same_pixels.pred_masks[0], expected["low_res_logits"]) < TOLERANCE
    assert relative_error(same_pixels.iou_scores[0], expected["iou_predictions"]) < TOLERANCE


def test_ours_to_hf_to_ours_changes_no_bit_and_keeps_the_pixel_statistics(tmp_path):
    config = model_config("sam_vit_tiny")
    config |= {"pixel_mean": [100.5, 90.25, 33.0], "pixel_std": [40.0, 41.5, 12.3456]}
    model = build_model(config).eval()
    HuggingFaceExport().write(model, tmp_path / "hf")

    again = load_model(tmp_path / "hf")

    for name in ("pixel_mean", "pixel_std"):
        assert torch.equal(getattr(again, name), getattr(model, name))
    assert again.mask_decoder.transformer.layer_norm_eps == 1e-5
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())


def test_the_statistics_that_transformers_itself_writes_are_read(folder, tmp_path):
    model, path = folder
    theirs = SamModel.from_pretrained(path)
    for name in ("first", "second"):
        theirs.save_pretrained(tmp_path / name)
    SamProcessor.from_pretrained(path).save_pretrained(tmp_path / "first")

    for name in ("first", "second"):
        assert torch.equal(load_model(tmp_path / name).pixel_mean, model.pixel_mean)


def test_what_transformers_has_no_place_for_is_refused_with_all_reasons(tiny_sam, tmp_path):
    with pytest.raises(ValueError) as refused:
        HuggingFaceExport().write(tiny_sam, tmp_path / "hf")

    for reason in ("Hugging Face format", "TimmEncoder", "PromptDrawing", "FirstGuess"):
        assert reason in str(refused.value)
    assert not list(tmp_path.iterdir())
