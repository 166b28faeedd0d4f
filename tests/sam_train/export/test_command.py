"""`sam-export` as it is typed."""

import pytest
import torch

from sam_train import cli, config
from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.load import load_model
from sam_train.checkpoints.save import save_official


@pytest.fixture
def export(monkeypatch, tmp_path):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    return lambda *argv: cli.run("export", argv)


@pytest.mark.parametrize("name", ["official", "hf", "onnx"])
def test_a_format_is_built_from_its_settings(compose, name):
    form = config.instantiate(compose("export", [f"format={name}"]).format)
    assert form.is_folder == (name != "official")


def test_a_checkpoint_leaves_and_comes_back(export, official_file, tmp_path, capsys):
    official = f"checkpoint={official_file[1]}"
    assert export(official, "format=hf", "out=hf folder") == 0
    assert "SamProcessor.from_pretrained" in capsys.readouterr().out
    assert export("checkpoint=hf folder", "format=official", "out=new/again.pth") == 0

    again = torch.load(tmp_path / "new" / "again.pth", weights_only=True)
    state = official_file[0].state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_a_width_of_the_published_sizes_leaves_in_the_official_format(export, tmp_path, capsys):
    """Such a model is compared with the recipe of its name, which is composed while the command runs."""
    sizes = ["depth=1", "global_attn_indexes=[0]", "img_size=64"]
    node = model_config("sam_vit_b", [f"model.image_encoder.{size}" for size in sizes])
    save_official(build_model(node), tmp_path / "wide.pth")
    assert export("checkpoint=wide.pth", "format=official", "out=again.pth") == 0
    report = capsys.readouterr().out
    assert "No entry of segment_anything's registry has these sizes" in report
    assert "embed_dim=768" in report


def test_what_is_there_already_stays_unless_told(export, official_file, capsys):
    path = official_file[1]
    before = path.read_bytes()
    assert export(f"checkpoint={path}", "format=official", f"out={path}") == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert path.read_bytes() == before

    argv = [f"checkpoint={path}", "format=official", f"out={path}", "overwrite=true", "img_size=64"]
    assert export(*argv) == 0
    assert load_model(path).image_encoder.img_size == 64


def test_what_a_format_cannot_hold_is_one_message(export, tiny_sam_file, tmp_path, capsys):
    assert export(f"checkpoint={tiny_sam_file}", "format=official", "out=sam.pth") == 2

    text = capsys.readouterr().err
    assert text.startswith("sam-export: the official format has no place for a TimmEncoder")
    assert "FirstGuess" in text
    assert text.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {tiny_sam_file.name}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["format=onxx", "checkpoint=x", "out=y"], ["format=onxx", "onnx"]),
        (["checkpoint=x", "out=y"], ["format"]),
        (["format=hf"], ["checkpoint", "out"]),
        (["format=hf", "checkpoint=gone.pth", "out=y"], ["no such checkpoint"]),
        (["format=onnx", "format.smaller=int4", "checkpoint=x", "out=y"], ["int4", "int8"]),
    ],
)
def test_a_mistake_is_one_message(export, capsys, argv, words):
    assert export(*argv) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert all(word in text for word in words), text
