"""Formats are told apart by what is in the file; what cannot be read is one clear message."""

import json
import pickle
import zipfile

import pytest
import torch

from sam_train.checkpoints.build import model_config
from sam_train.checkpoints.files import CheckpointError
from sam_train.checkpoints.formats import checkpoint_payload, read_checkpoint
from sam_train.checkpoints.load import load_model
from sam_train.checkpoints.sam_keys import OFFICIAL_VIT, SAM_TRAIN
from sam_train.checkpoints.save import save_hugging_face


@pytest.fixture
def folder(official_file, tmp_path):
    """A Hugging Face folder of the toy SAM."""
    save_hugging_face(load_model(official_file[1]), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def own_file(official_file, tmp_path):
    """Writes a `.ckpt` as training does, with what `change` does to it."""

    def write(change=lambda content: None):
        checkpoint = read_checkpoint(official_file[1])
        state = {f"model.{name}": tensor for name, tensor in checkpoint.tensors.items()}
        content = {
            "pytorch-lightning_version": "2.6.0",
            "state_dict": {**state, "metrics.count": torch.zeros(1)},
            "sam_train": checkpoint_payload(checkpoint.config),
        }
        change(content)
        torch.save(content, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return write


def test_the_suffix_does_not_matter(official_file, tmp_path):
    file = official_file[1].rename(tmp_path / "weights.ckpt")
    assert read_checkpoint(file).table is OFFICIAL_VIT


def test_weights_beside_an_optimiser_state_are_found(official_file, tmp_path):
    state = torch.load(official_file[1], weights_only=True)
    torch.save({"model": state, "optimizer": {}, "epoch": 3}, tmp_path / "medsam.pth")
    assert (
        read_checkpoint(tmp_path / "medsam.pth").tensors.keys()
        == read_checkpoint(official_file[1]).tensors.keys()
    )


def test_the_older_pickle_form_of_torch_is_read(official_file, tmp_path):
    state = torch.load(official_file[1], weights_only=True)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert len(read_checkpoint(tmp_path / "old.pth").tensors) == len(state)


def test_our_checkpoint_is_rebuilt_with_its_own_description(own_file):
    checkpoint = read_checkpoint(own_file())
    assert checkpoint.table is SAM_TRAIN
    assert checkpoint.config["image_encoder"]["embed_dim"] == 48
    assert not any(name.startswith("metrics") for name in checkpoint.tensors)


def test_the_record_of_a_named_model_is_plain_json(own_file):
    record = checkpoint_payload(model_config("sam_vit_b"))
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("sam_train"), "without the record 'sam_train'"),
        (lambda c: c["sam_train"].update(format=99), "expected a model in format 1, got format 99"),
        (lambda c: c.update(state_dict=None), "is damaged"),
        (lambda c: c.update(sam_train=None), "is damaged"),
    ],
)
def test_a_checkpoint_of_ours_that_cannot_be_rebuilt_says_why(own_file, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(own_file(change))


def test_a_missing_file_is_answered_with_near_names(official_file):
    path = official_file[1]
    with pytest.raises(FileNotFoundError, match=r"did you mean .*official\.pth\?"):
        read_checkpoint(path.with_name("oficial.pth"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_checkpoint(path.parent / "nowhere" / "x.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (b"\xff\xd8\xff\xe0 a picture", "is no checkpoint; expected an official .pth"),
        (b"PK\x03\x04 and then nothing", "is damaged, cut short or no checkpoint"),
        (b"\x80\x02 and then nothing", "is damaged"),
        (pickle.dumps([1, 2]), "damaged|holds a list"),
    ],
    ids=["empty", "picture", "cut zip", "cut pickle", "list"],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "x.pth")


def test_a_truncated_checkpoint_is_refused(official_file, folder):
    for file in (official_file[1], folder / "model.safetensors"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cut short"):
        read_checkpoint(official_file[1])
    with pytest.raises(CheckpointError, match="cut short"):
        read_checkpoint(folder)


def test_an_archive_that_torch_did_not_write_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="damaged, cut short or no checkpoint"):
        read_checkpoint(tmp_path / "x.pth")


def test_objects_that_could_run_code_are_not_unpickled(tmp_path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*could run code"
    ):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, not weights"),
        ({"epoch": 3}, "holds epoch, not tensors by name"),
        ({}, "is no SAM: it holds nothing"),
        ({"fc.weight": torch.zeros(3)}, "is no SAM: it holds fc.weight"),
        ({"model": {"image_encoder.trunk.x": torch.zeros(3)}}, "is a SAM 2 checkpoint"),
        ({"vision_encoder.layers.0.x": torch.zeros(3)}, "give its folder"),
    ],
)
def test_other_contents_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "x.pth")


def test_folders_that_are_no_model_say_what_is_missing(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json; expected"):
        read_checkpoint(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"did you mean .*best\.ckpt"):
        read_checkpoint(tmp_path / "run")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a config\.json but no model\.safetensors"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        (None, "model_type", "sam2", "expected model_type to be 'sam', got 'sam2'"),
        ("vision_config", "hidden_act", "relu", "expected vision_config.hidden_act to be 'gelu'"),
        ("vision_config", "use_rel_pos", False, "expected vision_config.use_rel_pos to be True"),
    ],
)
def test_what_our_model_would_compute_otherwise_is_refused(folder, group, key, value, message):
    settings = json.loads((folder / "config.json").read_text())
    (settings[group] if group else settings)[key] = value
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


def test_a_damaged_config_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged or no JSON"):
        read_checkpoint(folder)


def test_a_shard_that_the_index_names_but_is_not_there(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"hf/outside\.safetensors is missing"):
        read_checkpoint(folder)


def test_a_hub_name_is_taken_from_the_cache(folder, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert read_checkpoint("facebook/sam-vit-toy").config["image_encoder"]["embed_dim"] == 48
    assert asked == ["facebook/sam-vit-toy"]


def test_a_hub_name_out_of_reach_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="facebook/sam-vit-toy is no file here"):
        read_checkpoint("facebook/sam-vit-toy")
