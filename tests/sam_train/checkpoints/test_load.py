"""Loading is strict, and the loaded model runs at other sizes and on other channels."""

import re

import pytest
import torch

from sam_train.checkpoints.build import build_model
from sam_train.checkpoints.files import CheckpointError
from sam_train.checkpoints.formats import checkpoint_payload, read_checkpoint
from sam_train.checkpoints.load import load_model, load_weights

BIAS = "image_encoder.blocks.1.norm2.bias"


def test_a_loaded_model_is_in_eval_mode_and_remembers_its_size(official_file):
    model = load_model(official_file[1])
    assert not any(module.training for module in model.modules())
    assert (model.image_encoder.img_size, model.low_res_size) == (128, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(BIAS), f"1 missing: {BIAS}"),
        (
            lambda s: s.update({"image_encoder.blocks.1.more": s[BIAS]}),
            "1 unexpected: image_.*more",
        ),
        (lambda s: s.update({"text.weight": s[BIAS]}), "1 unexpected: text.weight"),
        (
            lambda s: s.update({BIAS: s[BIAS][:7]}),
            rf"1 misshaped: {BIAS} \(expected 48, got 7\)",
        ),
        (
            lambda s: [s.pop(BIAS), s.update({"text.weight": torch.zeros(1)})],
            f"1 missing: {BIAS}; 1 unexpected: text.weight",
        ),
    ],
    ids=["missing", "unexpected", "foreign", "misshaped", "two at once"],
)
def test_tensors_that_do_not_fit_are_one_error_that_names_them(official_file, change, message):
    path = official_file[1]
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} does not fit.*{message}"):
        load_model(path)


@pytest.mark.parametrize(
    "name",
    [
        "image_encoder.pos_embed",
        "image_encoder.patch_embed.proj.weight",
        "mask_decoder.mask_tokens.weight",
    ],
)
def test_a_missing_tensor_that_tells_a_size_is_named(official_file, name):
    state = torch.load(official_file[1], weights_only=True)
    del state[name]
    torch.save(state, official_file[1])
    with pytest.raises(
        CheckpointError, match=f"no whole SAM: the tensor {re.escape(name)} is missing"
    ):
        load_model(official_file[1])


def own_checkpoint(path, source, **changes):
    """Stores `source`'s weights as training does, its description changed."""
    checkpoint = read_checkpoint(source)
    torch.save(
        {
            "state_dict": {f"model.{name}": tensor for name, tensor in checkpoint.tensors.items()},
            "sam_train": checkpoint_payload({**checkpoint.config, **changes}),
        },
        path,
    )
    return path


def test_our_checkpoint_gives_back_the_model_it_was_written_from(official_file, tmp_path):
    path = own_checkpoint(tmp_path / "last.ckpt", official_file[1], compile_encoder=True)
    state = load_model(official_file[1]).state_dict()
    model = load_model(path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    # Compiling is the training run's choice.
    assert model.image_encoder._compiled_call_impl is None


def test_a_checkpoint_cannot_name_code_to_run(official_file, tmp_path):
    node = {"_target_": "os.system", "command": "touch ran"}
    path = own_checkpoint(tmp_path / "bad.ckpt", official_file[1], image_encoder=node)
    for size in (None, 256):
        with pytest.raises(CheckpointError, match="expected a _target_ that is a model below"):
            load_model(path, img_size=size)


@pytest.mark.parametrize("img_size", [64, 192, 320])
def test_another_input_size_interpolates_the_stored_positions(
    official_file, relative_error, img_size
):
    published, path = official_file
    model = load_model(path, img_size=img_size)
    grid = img_size // 16
    assert model.prompt_encoder.image_embedding_size == (grid, grid)
    assert model.low_res_size == 4 * grid
    # The published encoder interpolates its relative positions itself; the absolute ones by hand here.
    positions = published.image_encoder.pos_embed.permute(0, 3, 1, 2)
    positions = torch.nn.functional.interpolate(
        positions, (grid, grid), mode="bicubic", antialias=True
    )
    published.image_encoder.pos_embed = torch.nn.Parameter(positions.permute(0, 2, 3, 1))
    images = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        expected = published.image_encoder(images)
        assert relative_error(model.image_encoder(images), expected) < 1e-5


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(official_file):
    with pytest.raises(CheckpointError, match="multiple of the stride 16, got 100"):
        load_model(official_file[1], img_size=100)


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_on_other_channels_a_grey_image_is_answered_alike(official_file, relative_error, in_chans):
    of_three = load_model(official_file[1])
    model = load_model(official_file[1], in_chans=in_chans)
    assert len(model.pixel_mean) == len(model.pixel_std) == in_chans
    grey = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        expected = of_three.image_encoder(grey.expand(-1, 3, -1, -1))
        got = model.image_encoder(grey.expand(-1, in_chans, -1, -1))
        assert relative_error(got, expected) < 1e-5
        assert model.preprocess(torch.zeros(in_chans, 128, 90)).shape == (in_chans, 128, 128)


def test_weights_go_into_a_model_that_is_there_already(official_file):
    config = read_checkpoint(official_file[1]).config
    config["image_encoder"] |= {"drop_path_rate": 0.3, "grad_checkpointing": True}
    config["mask_decoder"]["transformer"]["dropout"] = 0.1
    model = build_model(config).train()

    load_weights(model, official_file[1])

    state = load_model(official_file[1]).state_dict()
    assert model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_weights_for_another_size_say_what_to_set(official_file):
    config = read_checkpoint(official_file[1]).config
    config["image_encoder"]["img_size"] = 256
    with pytest.raises(CheckpointError, match=r"image_encoder\.pretrain_img_size=128"):
        load_weights(build_model(config), official_file[1])

    config["image_encoder"]["pretrain_img_size"] = 128
    model = build_model(config)
    load_weights(model, official_file[1])
    assert model.image_encoder.backbone.pos_embed.shape[1] == 8


def test_other_channels_only_on_request(official_file):
    config = read_checkpoint(official_file[1]).config
    config["image_encoder"]["in_chans"] = 1
    config |= {"pixel_mean": [100.0], "pixel_std": [50.0]}
    model = build_model(config)
    with pytest.raises(
        CheckpointError, match=r"1 misshaped: image_encoder\.patch_embed\.proj\.weight"
    ):
        load_weights(model, official_file[1])
    load_weights(model, official_file[1], inflate_channels=True)
    stored = torch.load(official_file[1], weights_only=True)[
        "image_encoder.patch_embed.proj.weight"
    ]
    got = model.image_encoder.backbone.patch_embed.proj.weight
    torch.testing.assert_close(got, stored.sum(1, keepdim=True))


def test_half_precision_weights_become_single(official_file):
    state = torch.load(official_file[1], weights_only=True)
    torch.save({name: tensor.half() for name, tensor in state.items()}, official_file[1])
    assert {p.dtype for p in load_model(official_file[1]).parameters()} == {torch.float32}
