"""What `format=official` writes, `segment_anything` loads strictly, and answers alike."""

from functools import partial

import pytest
import segment_anything.modeling as published
import torch
from torch import nn

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.load import load_model
from sam_train.export.official import OfficialExport, how_to_load

TOLERANCE = 1e-5


@pytest.fixture
def vit_tiny(randomise):
    """`model=sam_vit_tiny` with random weights."""
    return randomise(build_model(model_config("sam_vit_tiny"))).eval()


def published_vit_tiny() -> published.Sam:
    """The same, of `segment_anything`'s classes."""
    return published.Sam(
        image_encoder=published.ImageEncoderViT(
            img_size=256,
            embed_dim=128,
            depth=6,
            num_heads=4,
            mlp_ratio=3.0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=(2, 5),
            window_size=8,
            out_chans=128,
        ),
        prompt_encoder=published.PromptEncoder(
            embed_dim=128,
            image_embedding_size=(16, 16),
            input_image_size=(256, 256),
            mask_in_chans=16,
        ),
        mask_decoder=published.MaskDecoder(
            num_multimask_outputs=3,
            transformer=published.TwoWayTransformer(
                depth=2, embedding_dim=128, mlp_dim=256, num_heads=8
            ),
            transformer_dim=128,
            iou_head_depth=3,
            iou_head_hidden_dim=128,
        ),
    ).eval()


def test_the_small_vit_of_conf_leaves_for_segment_anything(vit_tiny, tmp_path, relative_error):
    lines = OfficialExport().write(vit_tiny, tmp_path / "sam.pth")
    theirs = published_vit_tiny()

    theirs.load_state_dict(torch.load(tmp_path / "sam.pth", weights_only=True), strict=True)

    assert "window_size=8" in lines[1]
    assert (tmp_path / "sam.pth").stat().st_size < 8e6
    image = 255 * torch.rand(3, 256, 170, generator=torch.Generator().manual_seed(0))
    entry = {
        "image": image,
        "original_size": (300, 200),
        "point_coords": torch.tensor([[[60.0, 70.0], [100.0, 9.0]]]),
        "point_labels": torch.tensor([[1, 0]]),
    }
    with torch.no_grad():
        expected, got = theirs([entry], False)[0], vit_tiny([entry], False)[0]
    for name in ("low_res_logits", "iou_predictions"):
        assert relative_error(got[name], expected[name]) < TOLERANCE
    assert torch.equal(got["masks"], expected["masks"])


def test_official_to_ours_to_official_changes_no_bit(official_file, tmp_path):
    OfficialExport().write(load_model(official_file[1]), tmp_path / "once.pth")
    OfficialExport().write(load_model(tmp_path / "once.pth"), tmp_path / "twice.pth")

    first, last = (
        torch.load(path, weights_only=True) for path in (official_file[1], tmp_path / "twice.pth")
    )
    assert first.keys() == last.keys()
    assert all(torch.equal(last[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_a_published_size_is_told_by_its_name_in_the_registry(name):
    with torch.device("meta"):
        model = build_model(model_config(f"sam_{name}"))
    assert how_to_load(model) == [f'segment_anything.sam_model_registry["{name}"](checkpoint=PATH)']


def test_a_model_that_no_format_but_onnx_holds_gives_all_reasons_at_once(tiny_sam, tmp_path):
    tiny_sam.pixel_mean += 1
    with pytest.raises(ValueError) as refused:
        OfficialExport().write(tiny_sam, tmp_path / "sam.pth")

    for reason in ("TimmEncoder", "PromptDrawing", "FirstGuess", "8 heads", "pixel_mean"):
        assert reason in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_other_pixel_statistics_are_not_lost_in_silence(vit_tiny, tmp_path):
    vit_tiny.pixel_std *= 2
    with pytest.raises(ValueError, match=r"does not hold pixel_std: expected SAM's \[58"):
        OfficialExport().write(vit_tiny, tmp_path / "sam.pth")


def test_weights_that_the_published_code_lacks_are_refused(vit_tiny, tmp_path):
    vit_tiny.mask_decoder.transformer.layers[0].self_attn.q_proj.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no place for 2 tensors: mask_decoder.*adapter\.weight"):
        OfficialExport().write(vit_tiny, tmp_path / "sam.pth")


def test_a_tiny_vit_leaves_at_the_size_that_mobile_sam_runs_at(tmp_path):
    config = model_config("mobile_sam")
    assert how_to_load(build_model(config)) == [
        'mobile_sam.sam_model_registry["vit_t"](checkpoint=PATH)'
    ]
    config["image_encoder"]["img_size"] = 256
    with pytest.raises(ValueError, match="TinyViT at 1024 px alone, got 256"):
        OfficialExport().write(build_model(config), tmp_path / "sam.pth")
