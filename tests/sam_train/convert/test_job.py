"""sam-convert data=NAME out=DIR, from sources made on the spot."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_train.convert.job import PARTS, conversion
from sam_train.convert.manifest import MANIFEST
from sam_train.convert.sample import ShardSettings, safe_key
from sam_train.convert.tally import Judge, Tally
from sam_train.convert.unit import Part, convert_unit
from sam_train.convert.units import tolerant
from sam_train.data.folder import FolderItems
from sam_train.data.indexed import IndexedSource
from sam_train.data.sa1b import ShardSource
from sam_train.data.source import UnusableSourceError
from sam_train.ops import rle

COUNT = 23


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images as JPEG, PNG and BMP with index masks: two objects and, in each third, a pixel more."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        suffix = ("jpg", "png", "bmp")[number % 3]
        Image.fromarray(pixels).save(folder / "images" / f"im.{number}.{suffix}")
        labels = np.zeros((24, 32), np.uint8)
        labels[2:9, 3:12], labels[12:20, 14:30] = 1, 2
        if number % 3 == 0:
            labels[0, 0] = 3
        Image.fromarray(labels).save(folder / "masks" / f"im.{number}.png")
    return folder


def source_of(data: Path, **settings) -> IndexedSource:
    items = FolderItems(images=str(data / "images"), masks=str(data / "masks"), kind="index")
    return IndexedSource(items=items, **settings)


@pytest.fixture
def convert(data, tmp_path):
    """Converts the data to a folder and returns the manifest."""

    def run(
        out="out",
        *,
        train=None,
        val=None,
        num_workers=0,
        max_bad_fraction=0.05,
        val_share=0.2,
        **settings,
    ):
        train = train or source_of(data)
        made = conversion(
            train,
            train if val is None else val,
            out=tmp_path / out,
            settings=ShardSettings(**{"images_per_shard": 4} | settings),
            config={"settings": settings, "train": str(train)},
            max_bad_fraction=max_bad_fraction,
            val_share=val_share,
        )
        return made.run(num_workers)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return found


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def records(folder: Path, pattern="*.tar"):
    source = ShardSource(path=str(folder / pattern), max_bad_fraction=0)
    return list(source.records(epoch=0, reader=0, num_readers=1, shuffle=False))


def test_every_image_arrives_once_with_its_masks(convert, data, tmp_path):
    manifest = convert(min_area=2)

    out = tmp_path / "out"
    found = {
        safe_key(record.key): record
        for record in source_of(data).records(epoch=0, reader=0, num_readers=1, shuffle=False)
    }
    written = {record.key: record for record in records(out)}
    assert written.keys() == found.keys() and len(found) == COUNT
    for key, record in written.items():
        expected = [rle.decode(a.rle) for a in found[key].annotations if a.area > 1]
        assert [rle.decode(a.rle).tolist() for a in record.annotations] == [
            mask.tolist() for mask in expected
        ]
        for annotation in record.annotations:
            assert annotation.area == rle.area(annotation.rle)
            assert annotation.bbox == rle.bbox(annotation.rle)
    assert manifest["small_masks"] == 8
    splits = manifest["splits"]
    assert splits["train"]["images"] + splits["val"]["images"] == COUNT
    assert 0 < splits["val"]["images"] < 12
    assert max(s["images"] for split in splits.values() for s in split["shards"]) <= 4


def test_jpeg_and_png_bytes_are_kept_and_others_encoded(convert, data, tmp_path):
    convert()
    written = samples(tmp_path / "out")
    for path in (data / "images").iterdir():
        files = written[safe_key(path.stem)]
        if path.suffix == ".bmp":
            close = np.asarray(Image.open(io.BytesIO(files["jpg"]))).astype(int)
            assert np.abs(close - pixels(path)).mean() < 6
        else:
            assert files[path.suffix[1:]] == path.read_bytes()
    convert("lossless", image_format="png")
    written = samples(tmp_path / "lossless")
    path = data / "images" / "im.2.bmp"
    same = Image.open(io.BytesIO(written[safe_key("im.2")]["png"]))
    np.testing.assert_array_equal(np.asarray(same), pixels(path))


def test_keys_are_safe_and_numbers_unique_over_both_splits(convert, tmp_path):
    convert()
    written = records(tmp_path / "out")
    assert all("." not in record.key and "/" not in record.key for record in written)
    ids = [annotation.id for record in written for annotation in record.annotations]
    assert len(set(ids)) == len(ids)
    image_ids = [
        json.loads(files["json"])["image"]["image_id"]
        for files in samples(tmp_path / "out").values()
    ]
    assert len(set(image_ids)) == COUNT


def test_names_that_are_made_safe_stay_apart():
    assert safe_key("sa_1-b") == "sa_1-b"
    assert len({safe_key(key) for key in ("a.b", "a/b", "a b", "a_b", "ä_b")}) == 5


def test_the_bytes_do_not_depend_on_the_number_of_processes(convert, tmp_path):
    assert convert("alone") == convert("together", num_workers=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


@pytest.mark.parametrize("settings", [{}, {"images_per_shard": 3, "shard_mb": 0.005}])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    convert, data, tmp_path, settings, monkeypatch
):
    convert("whole", **settings)
    rng = random.Random(0)

    class Killed(BaseException):
        pass

    def dying(*args, **kwargs):
        if rng.random() < 0.3:
            raise Killed
        return os_replace(*args, **kwargs)

    os_replace = Path.replace
    monkeypatch.setattr(Path, "replace", dying)
    kills = 0
    for _ in range(200):
        try:
            convert("parts", **settings)
            break
        except Killed:
            kills += 1
    assert kills >= 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert not (tmp_path / "parts" / PARTS).exists()


def test_only_open_shards_are_lost(data, tmp_path):
    from sam_train.convert.unit import Unit, finished_parts

    unit = Unit("train", 0, 1, 0)
    settings = ShardSettings(images_per_shard=5)
    source = tolerant(source_of(data))
    news = convert_unit(source, unit, tmp_path, settings)
    next(news), next(news)
    del news
    read = []

    class Counting(FolderItems):
        def record(self, index):
            read.append(index)
            return super().record(index)

    items = Counting(images=source.items.images, masks=source.items.masks, kind="index")
    list(convert_unit(IndexedSource(items=items), unit, tmp_path, settings))
    assert sorted(read) == list(range(10, COUNT))
    assert [len(part.keys) for part in finished_parts(tmp_path, unit)] == [5, 5, 5, 5, 3]


SCRIPT = """
import sys
from pathlib import Path
from sam_train.convert.job import conversion
from sam_train.convert.sample import ShardSettings
from sam_train.data.folder import FolderItems
from sam_train.data.indexed import IndexedSource

if __name__ == "__main__":
    data, out = sys.argv[1:]
    items = FolderItems(images=data + "/images", masks=data + "/masks", kind="index")
    source = IndexedSource(items=items)
    conversion(source, None, out=Path(out), settings=ShardSettings(images_per_shard=1),
               config={}, max_bad_fraction=0, val_share=0).run(2)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # four starts of three processes that import torch
def test_killed_and_started_again_it_ends_with_the_same_bytes(data, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(out):
        return subprocess.Popen([sys.executable, str(script), str(data), str(tmp_path / out)])

    assert start("whole").wait() == 0
    for number in (3, 12):
        process = start("killed")
        parts = tmp_path / "killed" / PARTS
        while process.poll() is None and len(list(parts.glob("*.json"))) < number:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / MANIFEST).exists()
    assert start("killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_conversion_says_so_and_is_left_alone(convert, tmp_path, monkeypatch):
    manifest = convert()
    before = contents(tmp_path / "out")
    monkeypatch.setattr("sam_train.convert.job.Conversion._convert", None)
    assert convert() == manifest
    assert contents(tmp_path / "out") == before


def test_another_conversion_in_the_same_folder_is_refused(convert, tmp_path):
    convert()
    with pytest.raises(ValueError, match=r"another conversion(.|\n)*min_area(.|\n)*out=DIR"):
        convert(min_area=9)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "train-000000.tar").touch()
    with pytest.raises(ValueError, match="holds files already"):
        convert("full")


def test_a_mistake_in_the_first_command_leaves_the_folder_free(convert, data, tmp_path):
    items = FolderItems(images=str(tmp_path / "typo"), masks=str(data / "masks"), kind="index")
    with pytest.raises(FileNotFoundError, match="typo"):
        convert(train=IndexedSource(items=items))
    assert not (tmp_path / "out").exists()

    wrong = tmp_path / "wrong"
    shutil.copytree(data, wrong)
    for path in (wrong / "masks").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UnusableSourceError):
        convert(train=source_of(wrong))
    assert sum(split["images"] for split in convert()["splits"].values()) == COUNT


def test_what_a_kill_leaves_behind_is_cleared(convert, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".convert.json.x7a").touch()
    manifest = convert()
    assert not list(out.glob(".*"))

    (out / PARTS).mkdir()  # killed between the manifest and this folder's end
    assert convert() == manifest
    assert not (out / PARTS).exists()


def test_damage_is_named_in_the_manifest_and_judged(convert, data, tmp_path, caplog):
    bad = tmp_path / "bad"
    for part in ("images", "masks"):
        (bad / part).mkdir(parents=True)
        for path in (data / part).iterdir():
            os.link(path, bad / part / path.name)
    (bad / "images" / "im.4.png").unlink()
    (bad / "images" / "im.4.png").write_bytes((data / "images" / "im.4.png").read_bytes()[:-90])

    manifest = convert(train=source_of(bad), max_bad_fraction=0.1)

    assert [entry["name"] for entry in manifest["damaged"]] == ["im.4"]
    assert "cannot be decoded" in manifest["damaged"][0]["reason"]
    assert "im.4 is damaged and left out" in caplog.text
    assert sum(split["images"] for split in manifest["splits"].values()) == COUNT - 1
    for _ in range(2):  # the second time all has been read
        with pytest.raises(UnusableSourceError, match=r"1 of 23 .*im\.4.*max_bad_fraction=0\.01"):
            convert("strict", train=source_of(bad), max_bad_fraction=0.01)
    assert not (tmp_path / "strict" / MANIFEST).exists()


def test_damage_met_for_both_splits_counts_once(convert, data, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    for number in (4, 7):
        (bad / "masks" / f"im.{number}.png").write_bytes(b"no image")

    manifest = convert(train=source_of(bad), max_bad_fraction=2 / COUNT, val_share=0.4)

    assert [entry["name"] for entry in manifest["damaged"]] == ["im.4", "im.7"]
    with pytest.raises(UnusableSourceError, match=f"2 of {COUNT} "):
        convert("strict", train=source_of(bad), max_bad_fraction=0.05, val_share=0.4)


def test_damage_of_the_same_name_in_other_files_counts_twice():
    part = {"damaged": [("im.4", "no image")]}
    tally = Tally()
    for split in ("train", "train", "val"):
        tally.add(Part(split=split, **part))
    assert len(tally.all_damaged()) == 3
    tally.kept_share = 0.9
    assert len(tally.all_damaged()) == 2


def test_a_share_still_unread_is_not_held_against_the_images_that_are_read():
    tally = Tally(kept_share=0.5)
    judge = Judge(0.05, tally)
    damaged = [(f"im.{number}", "no image") for number in range(50)]
    judge.add(Part(split="train", keys=list(map(str, range(475))), damaged=damaged))
    judge.add(Part(split="val", keys=list(map(str, range(475))), damaged=damaged))
    judge.finish()


def test_names_that_come_twice_are_an_error_that_says_what_to_do(convert, make, tmp_path):
    for number in range(2):
        make.tar(tmp_path / f"{number}.tar", make.files(make.square("same")))
    source = ShardSource(path=str(tmp_path / "?.tar"))
    with pytest.raises(ValueError, match=r"same.*keys=numbered"):
        convert(train=source, val_share=0)
    convert("numbered", train=source, val_share=0, keys="numbered")
    keys = [record.key for record in records(tmp_path / "numbered")]
    assert keys == ["train_000000_000000", "train_000001_000000"]


def test_names_that_come_twice_are_found_before_all_is_converted(convert, make, tmp_path):
    for number, key in enumerate(("same", "same", "other")):
        make.tar(tmp_path / f"{number}.tar", make.files(make.square(key)))
    with pytest.raises(ValueError, match="keys=numbered"):
        convert(train=ShardSource(path=str(tmp_path / "?.tar")), val_share=0)
    assert len(list((tmp_path / "out" / PARTS).glob("*.tar"))) == 2


def test_data_that_changed_since_is_refused(convert, make, tmp_path):
    for number, key in enumerate(("same", "same")):
        make.tar(tmp_path / f"{number}.tar", make.files(make.square(key)))
    source = ShardSource(path=str(tmp_path / "?.tar"))
    with pytest.raises(ValueError, match="keys=numbered"):
        convert(train=source, val_share=0)
    content = [make.files(make.square(f"b{number}")) for number in range(20)]
    make.tar(tmp_path / "1.tar", {k: v for one in content for k, v in one.items()})
    with pytest.raises(ValueError, match="the data has changed"):
        convert(train=source, val_share=0)


def test_images_left_without_masks_are_counted(convert, tmp_path):
    with pytest.raises(ValueError, match="no image with a mask"):
        convert(min_area=1000)
    manifest = convert("kept", min_area=1000, keep_empty=True)
    assert sum(split["images"] for split in manifest["splits"].values()) == COUNT


@pytest.mark.parametrize(
    "settings", [{"shard_mb": 0}, {"images_per_shard": 0}, {"image_format": "webp"}, {"keys": "x"}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ShardSettings(**settings)
