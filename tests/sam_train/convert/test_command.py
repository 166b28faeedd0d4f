"""sam-convert as it is typed, and what it says of mistakes."""

import json
import os

import pytest

from sam_train import cli
from sam_train.convert import tar_writer


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *argv: cli.run("convert", ["num_workers=0", *argv])


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
        (["data=shards", "data.path=2017", "out=made"], "no file 2017"),
        (["data=coco", "data.images=2017", "data.annotations=1", "out=made"], "2017: there is no"),
        (["data=folder", "data.images=2017", "data.masks=1", "out=made"], "2017: there is no"),
        (["data=shards", "data.path=x", "out=made", "shard_mb=big"], "shard_mb is a number"),
        (["data=shards", "data.path=x", "out=made", "min_area=x"], "min_area is a whole number"),
        (["data=shards", "data.path=x", "out=made", "images_per_shard=1.5"], "a whole number"),
        (["data=shards", "data.path=x", "out=made", "num_workers=-1"], "0 or more, got -1"),
        (["data=shards", "data.path=x", "out=made", "num_workers=two"], "0 or more, got 'two'"),
        (["data=shards", "data.path=x", "out=a_file"], "out=a_file is a file"),
        (["check=x", "out=a_file"], "out=a_file is a file"),
        (["check=x", "num_pictures=-1"], "num_pictures is a whole number"),
        (["check=x", "stats=x"], "one at a time"),
        (["check=2017"], "no file 2017"),
        (["stats=2017"], "no file 2017"),
        (["check=[]"], "check= names no shards"),
        (["stats=''"], "stats= names no shards"),
        (["check=a_file"], "a_file: it is no tar file"),
        (["stats=a_file"], "a_file: none of its images can be read"),
        (["check=."], "no shards at ."),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(run, capsys, tmp_path, argv, expected):
    (tmp_path / "a_file").write_text("no tar")
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("sam-convert: ") and expected in said and "Traceback" not in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_one_message_that_names_the_file(run, make, tmp_path, capsys, monkeypatch):
    make.tar(tmp_path / "a.tar", make.files(make.square("a")))
    real = tar_writer._Summed.__init__
    argv = ["data=shards", "data.path=a.tar", "out=made", "val_share=0"]
    with monkeypatch.context() as patch:
        patch.setattr(tar_writer._Summed, "__init__", lambda self, path: real(self, "/dev/full"))
        assert run(*argv) == 2
    said = capsys.readouterr().err
    assert "/dev/full: No space left on device. Finished shards are kept" in said
    assert "Traceback" not in said
    assert run(*argv) == 0


def test_faults_end_in_exit_code_2(run, make, tmp_path, capsys):
    files = make.files(make.square("a"))
    make.tar(tmp_path / "a.tar", files | {"a.json": files["a.json"][:-4]})
    assert run("check=a.tar") == 2
    assert "a.tar:a: its JSON does not parse" in capsys.readouterr().err
    assert "does not parse" in (tmp_path / "outputs/check/faults.txt").read_text()
