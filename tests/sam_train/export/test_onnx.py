"""The ONNX files answer as the model, and the decoder as `segment_anything`'s own ONNX form."""

import pytest
import torch
from segment_anything.utils.onnx import SamOnnxModel

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.load import load_model
from sam_train.export import onnx_check
from sam_train.export.onnx import OnnxExport
from sam_train.export.onnx_modules import OnnxDecoder

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TOLERANCE = 1e-3


@pytest.fixture
def tiny_model(randomise):
    """`sam_tiny`'s parts, all of them, at 64 px."""
    config = model_config("sam_tiny")
    config["image_encoder"] |= {"img_size": 64}
    config["image_encoder"]["backbone"] |= {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}
    return randomise(build_model(config)).eval()


@pytest.mark.parametrize("return_single_mask", [True, False])
def test_the_decoder_answers_as_the_published_onnx_form(
    official_file, tmp_path, relative_error, return_single_mask
):
    published, path = official_file
    model = load_model(path)
    OnnxExport(return_single_mask=return_single_mask).write(model, tmp_path / "onnx")
    theirs = SamOnnxModel(published, return_single_mask=return_single_mask)
    decoder = onnx_check.session(tmp_path / "onnx" / "decoder.onnx")
    assert [entry.name for entry in decoder.get_inputs()] == list(OnnxDecoder.INPUTS)
    assert [entry.name for entry in decoder.get_outputs()] == list(OnnxDecoder.OUTPUTS)

    counts = set()
    embedding = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(3))
    for case in onnx_check.cases(model, seed=5):
        inputs = case.inputs(embedding)
        counts.add(case.coords.shape[1])
        expected = theirs(*inputs.values())
        for got, values in zip(onnx_check.run(decoder, inputs), expected, strict=True):
            assert relative_error(got, values) < TOLERANCE, str(case)
    assert {2, 3, 17, 66} <= counts


def test_a_model_with_a_timm_encoder_and_a_first_guess_leaves_too(tiny_model, tmp_path):
    lines = OnnxExport(smaller="float16").write(tiny_model, tmp_path / "onnx")

    sizes = {path.name: path.stat().st_size for path in (tmp_path / "onnx").iterdir()}
    assert sizes.keys() == {"encoder.onnx", "decoder.onnx", "decoder.float16.onnx"}
    assert sizes["decoder.float16.onnx"] < 0.8 * sizes["decoder.onnx"]
    assert "opset 17" in lines[0]
    assert "pixels change sides" in lines[-1]


def test_a_tiny_vit_leaves_with_its_windows(randomise, tmp_path):
    config = model_config("mobile_sam")
    # Tokens a side are 32, 16 and 8 by stage: windows of 7 and 14 that do not fill the last of them.
    config["image_encoder"] |= {"img_size": 128, "out_chans": 32}
    config["prompt_encoder"] |= {"embed_dim": 32}
    config["mask_decoder"] |= {"transformer_dim": 32, "iou_head_hidden_dim": 24}
    config["mask_decoder"]["transformer"] |= {"embedding_dim": 32, "mlp_dim": 64}
    model = randomise(build_model(config)).eval()

    OnnxExport().write(model, tmp_path / "onnx")

    found = onnx_check.encoder_difference(model, tmp_path / "onnx" / "encoder.onnx", seed=9)
    assert found.largest < TOLERANCE


def test_another_size_than_the_stored_one_leaves_with_its_positions(official_file, tmp_path):
    model = load_model(official_file[1], img_size=192)
    OnnxExport().write(model, tmp_path / "onnx")

    found = onnx_check.encoder_difference(model, tmp_path / "onnx" / "encoder.onnx", seed=9)
    assert found.largest < TOLERANCE
    assert model.image_encoder.backbone.pos_embed.shape[1] == 8, "the model itself stays as it was"


def test_eight_bits_are_smaller_and_measured(randomise, tmp_path):
    model = randomise(build_model(model_config("sam_vit_tiny"))).eval()
    lines = OnnxExport(encoder=False, smaller="int8").write(model, tmp_path / "onnx")

    sizes = {path.name: path.stat().st_size for path in (tmp_path / "onnx").iterdir()}
    assert sizes.keys() == {"decoder.onnx", "decoder.int8.onnx"}
    assert sizes["decoder.int8.onnx"] < 0.7 * sizes["decoder.onnx"]
    small = tmp_path / "onnx" / "decoder.int8.onnx"
    found, _ = onnx_check.decoder_difference(model, small, return_single_mask=True)
    assert str(found) in lines[-1]
    assert found.largest > 1e-4, "eight bits cannot be this exact: was the other file measured?"


def test_a_file_that_answers_otherwise_is_refused(official_file, tmp_path, monkeypatch):
    model = load_model(official_file[1])
    with pytest.raises(ValueError, match=r"encoder\.onnx: onnxruntime differs.*tolerance"):
        OnnxExport(tolerance=1e-12).write(model, tmp_path / "exact")

    answer = onnx_check.answer

    def other(*args, **kwargs):
        masks, ious, low_res_masks = answer(*args, **kwargs)
        return [masks, ious + 0.1, low_res_masks]

    monkeypatch.setattr(onnx_check, "answer", other)
    with pytest.raises(ValueError, match=r"decoder\.onnx: onnxruntime differs.*points"):
        OnnxExport().write(model, tmp_path / "other")


def test_settings_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="float16, int8 or null, got int4"):
        OnnxExport(smaller="int4")


def test_an_encoder_that_one_file_cannot_hold_is_refused_before_it_is_traced(tmp_path):
    with torch.device("meta"):
        model = build_model(model_config("sam_vit_h"))
    with pytest.raises(ValueError, match=r"encoder's 2\.5 GB.*format\.encoder=false"):
        OnnxExport().write(model, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mobile_sam_leaves_at_its_real_size(randomise, tmp_path):
    # ViT-B takes minutes: benchmarks/export.py has both.
    model = randomise(build_model(model_config("mobile_sam"))).eval()

    # Raises where onnxruntime differs by more on any of 4 pictures and 22 prompts of 2 to 66 points.
    lines = OnnxExport(tolerance=TOLERANCE).write(model, tmp_path / "onnx")

    assert model.image_encoder.img_size == 1024
    assert [line.split(":")[0] for line in lines[1:]] == ["encoder.onnx", "decoder.onnx"]
