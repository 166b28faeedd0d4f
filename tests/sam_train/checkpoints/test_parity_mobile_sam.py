"""Our TinyViT model answers as MobileSAM's published code did; see tests/golden/record_mobile_sam.py."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sam_train.checkpoints.load import load_model
from sam_train.checkpoints.save import save_official

TOLERANCE = 1e-5  # of the largest number; float32 leaves about 1e-6
RECORDER = Path(__file__).parents[2] / "golden" / "record_mobile_sam.py"


@pytest.fixture(scope="module")
def recorder():
    spec = importlib.util.spec_from_file_location("record_mobile_sam", RECORDER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden(recorder):
    return json.loads(recorder.GOLDEN.read_text())


@pytest.fixture(scope="module")
def published_file(recorder, golden, tmp_path_factory):
    """The checkpoint of the recorded run, drawn again from its tensors' names."""
    path = tmp_path_factory.mktemp("mobile_sam") / "mobile_sam.pt"
    shapes = {
        name: tuple(int(side) for side in shape.split("x") if side)
        for name, shape in golden["tensors"].items()
    }
    torch.save({name: recorder.draw(name, shape) for name, shape in shapes.items()}, path)
    return path


def test_answers_are_those_of_the_published_code(recorder, golden, published_file):
    answers = recorder.answers(load_model(published_file))

    for name, expected in golden["answers"].items():
        got = answers[name]
        message = f"{name} differs; to record again: {recorder.__doc__}"
        assert got["shape"] == expected["shape"], message
        errors = [abs(a - b) for a, b in zip(got["samples"], expected["samples"], strict=True)]
        assert max(errors) / expected["abs_max"] < TOLERANCE, message
        assert abs(got["mean"] - expected["mean"]) / expected["abs_max"] < TOLERANCE, message


def test_written_back_every_tensor_has_its_published_name_shape_and_value(
    published_file, golden, tmp_path
):
    model = load_model(published_file)
    save_official(model, tmp_path / "again.pt")

    published = torch.load(published_file, weights_only=True)
    again = torch.load(tmp_path / "again.pt", weights_only=True)

    shapes = {name: "x".join(map(str, tensor.shape)) for name, tensor in again.items()}
    assert shapes == golden["tensors"]
    # The classifier feeds no mask: our model does not keep it.
    kept = [
        name for name in again if not name.startswith(("image_encoder.head", "image_encoder.norm"))
    ]
    assert len(again) - len(kept) == 4
    assert all(torch.equal(again[name], published[name]) for name in kept)


def test_other_sizes_run_with_the_same_weights(published_file):
    model = load_model(published_file, img_size=256)
    with torch.no_grad():
        embeddings = model.image_encoder(torch.randn(2, 3, 256, 256))
    assert embeddings.shape == (2, 256, 16, 16)
    assert model.low_res_size == 64


def test_a_tiny_vit_of_unknown_width_is_refused(published_file, tmp_path):
    state = torch.load(published_file, weights_only=True)
    name = "image_encoder.layers.3.blocks.0.attn.norm.weight"
    state[name] = state[name][:100]
    torch.save(state, tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match="last width 100.*none of tiny_vit_5m_224"):
        load_model(tmp_path / "narrow.pt")
