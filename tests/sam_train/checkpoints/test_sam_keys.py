"""Every tensor has one name on either side of each table."""

import pytest
import torch
from segment_anything import sam_model_registry

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.sam_keys import MOBILE_SAM, OFFICIAL_VIT, SAM_TRAIN, hugging_face


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_our_models_have_the_names_and_shapes_of_the_published_ones(name):
    with torch.device("meta"):
        published = sam_model_registry[name]().state_dict()
        ours = build_model(model_config(f"sam_{name}")).state_dict()

    renamed = {OFFICIAL_VIT.theirs(key): tensor.shape for key, tensor in ours.items()}

    assert renamed == {key: tensor.shape for key, tensor in published.items()}


@pytest.mark.parametrize(
    ("model", "table"),
    [
        ("sam_vit_b", OFFICIAL_VIT),
        ("sam_vit_b", hugging_face(iou_head_depth=3)),
        ("sam_vit_b", SAM_TRAIN),
        ("mobile_sam", MOBILE_SAM),
        ("mobile_sam", SAM_TRAIN),
    ],
)
def test_a_name_translated_there_and_back_is_itself(model, table):
    with torch.device("meta"):
        names = list(build_model(model_config(model)).state_dict())

    theirs = [table.theirs(name) for name in names]

    assert len(set(theirs)) == len(names)
    assert [table.ours(name) for name in theirs] == names


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_iou_head_keeps_its_order_at_any_depth(depth):
    table = hugging_face(depth)
    head = "mask_decoder.iou_prediction_head"
    theirs = [table.theirs(f"{head}.layers.{i}.weight") for i in range(depth)]
    inner = [f"{head}.layers.{i}.weight" for i in range(depth - 2)]
    assert theirs == [f"{head}.proj_in.weight", *inner, f"{head}.proj_out.weight"]


def test_a_foreign_name_has_no_translation():
    assert OFFICIAL_VIT.ours("text_encoder.weight") is None
    assert OFFICIAL_VIT.ours("mask_decoder_2.weight") is None
    assert hugging_face(3).ours("vision_encoder.layers.x.attn.qkv.weight") is None
