"""What we write, the software it is meant for reads, strictly, and answers alike."""

import pytest
import torch
from transformers import SamModel

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.load import load_model
from sam_train.checkpoints.save import (
    save_hugging_face,
    save_official,
    to_hugging_face,
    to_official_state_dict,
)
from sam_train.models.prompt_drawing import PromptDrawing

TOLERANCE = 1e-5


def test_an_official_file_comes_back_bit_by_bit(official_file, tmp_path):
    published, path = official_file
    save_official(load_model(path), tmp_path / "new" / "again.pth")
    again = torch.load(tmp_path / "new" / "again.pth", weights_only=True)
    state = published.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    published.load_state_dict(again)


def test_transformers_reads_our_folder_and_answers_alike(official_file, tmp_path, relative_error):
    published, path = official_file
    model = load_model(path)
    save_hugging_face(model, tmp_path / "hf")

    theirs, report = SamModel.from_pretrained(tmp_path / "hf", output_loading_info=True)

    assert not any(report.values()), report
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    points, labels = torch.tensor([[[9.0, 70.0]]]), torch.tensor([[1]])
    with torch.no_grad():
        got = theirs.eval()(
            pixel_values=images, input_points=points[None], input_labels=labels[None]
        )
        sparse, dense = published.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        masks, iou_predictions = published.mask_decoder(
            image_embeddings=published.image_encoder(images),
            image_pe=published.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
    assert relative_error(got.pred_masks[0], masks) < TOLERANCE
    assert relative_error(got.iou_scores[0], iou_predictions) < TOLERANCE


def test_a_folder_comes_back_bit_by_bit(official_file, tmp_path):
    model = load_model(official_file[1])
    save_hugging_face(model, tmp_path / "hf")
    again = load_model(tmp_path / "hf")
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())


def test_positions_are_written_for_the_size_the_model_runs_at(
    official_file, tmp_path, relative_error, published_sam
):
    model = load_model(official_file[1], img_size=192)
    at_192 = published_sam(img_size=192)

    at_192.load_state_dict(to_official_state_dict(model))

    images = torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.image_encoder(images)
        assert relative_error(at_192.image_encoder(images), expected) < TOLERANCE


def test_a_failed_write_leaves_the_old_file_and_nothing_else(official_file, monkeypatch):
    _, path = official_file
    before = path.read_bytes()
    model = load_model(path)

    def broken(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_official(model, path)

    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_a_format_cannot_express_is_refused(official_file):
    config = model_config("mobile_sam")
    target = "sam_train.models.image_encoder.TimmEncoder"
    config["image_encoder"] = {"_target_": target, "name": "convnext_atto", "img_size": 64}
    tiny_sam = build_model(config)
    with pytest.raises(ValueError, match="official format has no place for a TimmEncoder"):
        to_official_state_dict(tiny_sam)
    with pytest.raises(ValueError, match="Hugging Face format has no place for a TimmEncoder"):
        to_hugging_face(tiny_sam)
    model = load_model(official_file[1])
    model.mask_decoder.transformer.num_heads = 4
    with pytest.raises(ValueError, match="8 heads in the mask decoder, got 4"):
        to_official_state_dict(model)

    model = load_model(official_file[1])
    model.prompt_encoder.drawing = PromptDrawing(embed_dim=model.prompt_encoder.embed_dim)
    for form, save in (("official", to_official_state_dict), ("Hugging Face", to_hugging_face)):
        with pytest.raises(ValueError, match=f"{form} format has no place for a PromptDrawing"):
            save(model)
