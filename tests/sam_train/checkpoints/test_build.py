"""Descriptions of models become models, and nothing else becomes anything."""

import copy

import pytest
import torch

from sam_train import config
from sam_train.checkpoints.build import build_model, model_config
from sam_train.models.image_encoder import SamVitEncoder, TinyVitEncoder


@pytest.mark.parametrize("name", sorted({*config.options("model")} - {"from_checkpoint"}))
def test_every_named_model_is_built_from_its_plain_description(name):
    # The large ones without their weights.
    with torch.device("meta" if name.startswith("sam_vit") else "cpu"):
        model = build_model(model_config(name))
    side = model.image_encoder.img_size // model.image_encoder.stride
    assert model.prompt_encoder.image_embedding_size == (side, side)
    assert model.mask_decoder.transformer_dim == model.image_encoder.out_chans


@pytest.mark.parametrize(
    ("name", "encoder", "millions"),
    [
        ("sam_vit_b", SamVitEncoder, 93.7),
        ("sam_vit_l", SamVitEncoder, 312.3),
        ("sam_vit_h", SamVitEncoder, 641.1),
        ("mobile_sam", TinyVitEncoder, 9.8),
    ],
)
def test_the_published_models_have_their_published_number_of_parameters(name, encoder, millions):
    with torch.device("meta"):
        model = build_model(model_config(name))
    assert isinstance(model.image_encoder, encoder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_overrides_change_the_description():
    changed = model_config("sam_vit_b", ["model.image_encoder.img_size=512"])
    assert changed["image_encoder"]["img_size"] == 512
    assert changed["prompt_encoder"]["embed_dim"] == 256


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="no model is called 'sam_vit_g'.*mobile_sam, .*sam_vit_b"):
        model_config("sam_vit_g")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.nn.Linear",
        "sam_train.models.image_encoder.timm.create_model",
        "sam_train.models.image_encoder.nn",
        "sam_train.models.sam.F",
        "sam_train.models.image_encoder.VisionTransformerSAM",
        "sam_train.models.nothing.Sam",
        "sam_train.checkpoints.load.load_model",
        None,
    ],
)
def test_only_the_projects_own_models_are_built(target):
    node = copy.deepcopy(model_config("mobile_sam"))
    node["image_encoder"] = {"_target_": target, "command": "echo"}
    with pytest.raises(ValueError, match="expected a _target_ that is a model below sam_train"):
        build_model(node)


def test_a_stored_description_starts_no_download(monkeypatch):
    node = model_config("mobile_sam")
    node["image_encoder"] = {
        "_target_": "sam_train.models.image_encoder.TimmEncoder",
        "name": "convnext_atto",
        "img_size": 64,
        "pretrained": True,
    }
    monkeypatch.setattr("timm.models._builder.load_pretrained", pytest.fail)
    assert build_model(node).image_encoder.img_size == 64


@pytest.mark.parametrize(
    "change",
    [{"depht": 3}, {"num_heads": 7}, {"img_size": 100}],
    ids=["unknown argument", "heads that do not divide", "size no multiple of the patch"],
)
def test_arguments_that_do_not_fit_are_one_error(change):
    node = model_config("sam_vit_b")
    node["image_encoder"] |= change
    with torch.device("meta"), pytest.raises(ValueError, match=r"cannot be built|multiple of"):
        build_model(node)


def test_a_part_alone_is_no_model():
    with pytest.raises(ValueError, match="expected the description of a Sam, got PromptEncoder"):
        build_model(model_config("sam_vit_b")["prompt_encoder"])
