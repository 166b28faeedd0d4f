"""sam-convert as it is typed, and what it says of mistakes."""

import json

import pytest

from sam_train import cli


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *argv: cli.run("convert", [*argv, "num_workers=0"])


def test_a_folder_becomes_shards_that_pass(run, make, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    make.tar(tmp_path / "in" / "a.tar", make.files(make.square("a")) | make.files(make.square("b")))

    assert run("data=shards", "data.path=in", "out=made", "val_share=0") == 0
    said = capsys.readouterr().out
    assert "train: 2 images, 2 masks in 1 shards" in said and "check=made" in said
    assert json.loads((tmp_path / "made/manifest.json").read_text())["damaged"] == []

    assert run("check=made", "num_pictures=1") == 0
    assert "no fault; pictures of some in outputs/check" in capsys.readouterr().out
    assert run("stats=made") == 0
    assert "2 images, 2 masks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "say data=NAME out=DIR to convert, check=PATH or stats=PATH"),
        (["data=shards", "data.path=x"], "say data=NAME out=DIR"),
        (["data=coco", "out=made"], "no value for data.images, data.annotations"),
        (["data=shards", "data.path=nowhere", "out=made"], "nowhere"),
        (
            ["data=coco", "data.images=a", "data.annotations=b", "out=made"],
            "no such folder of images",
        ),
        (["data=shards", "data.path=x", "out=made", "keys=new"], "keys is original or numbered"),
        (["check=nowhere"], "nowhere"),
        (["stats=nowhere"], "nowhere"),
        (["data=cocoo", "out=made"], "Did you mean coco"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(run, capsys, argv, expected):
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("sam-convert: ") and expected in said and "Traceback" not in said


def test_faults_end_in_exit_code_2(run, make, tmp_path, capsys):
    files = make.files(make.square("a"))
    make.tar(tmp_path / "a.tar", files | {"a.json": files["a.json"][:-4]})
    assert run("check=a.tar") == 2
    assert "a.tar:a: its JSON does not parse" in capsys.readouterr().err
    assert "does not parse" in (tmp_path / "outputs/check/faults.txt").read_text()
