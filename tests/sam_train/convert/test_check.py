import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from sam_train.convert.check import check, check_sample
from sam_train.convert.stats import stats
from sam_train.data.shards import encode_record


@pytest.fixture
def shards(make, tmp_path):
    files, number = {}, 0
    for key in ("a", "b", "c"):
        record = make.square(key)
        content = make.files(record)
        parsed = json.loads(content[f"{key}.json"])
        parsed["annotations"][0]["id"] = number = number + 1
        files |= content | {f"{key}.json": json.dumps(parsed).encode()}
    return make.tar(tmp_path / "train-000000.tar", files)


def test_whole_shards_pass_and_pictures_are_drawn(shards, tmp_path):
    said = check(str(shards), tmp_path / "out", 2, 0)
    assert "3 images, 3 masks in 1 shards" in said and "no fault" in said
    pictures = sorted((tmp_path / "out").iterdir())
    assert len(pictures) == 2
    # The square is white on black, and tinted.
    with Image.open(pictures[0]) as picture:
        drawn = np.asarray(picture).astype(int)
    assert (np.ptp(drawn, axis=2) > 60).sum() > 40


def test_keys_and_ids_that_come_twice_are_faults(make, tmp_path):
    for number in range(2):
        make.tar(tmp_path / f"train-{number:06d}.tar", make.files(make.square("a")))
    make.tar(tmp_path / "val-000000.tar", make.files(make.square("a")))
    with pytest.raises(ValueError, match=r"2 faults in 3 images") as raised:
        check(str(tmp_path), tmp_path / "out", 0, 0)
    assert "a: its key comes 2 times" in str(raised.value)
    assert "mask id 0: it comes 3 times" in str(raised.value)
    assert len((tmp_path / "out" / "faults.txt").read_text().splitlines()) == 2


def test_a_shard_that_breaks_off_or_differs_from_its_manifest_is_a_fault(shards, tmp_path):
    entry = {"name": shards.name, "sha256": "0" * 64}
    manifest = {"splits": {"train": {"shards": [entry]}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"1 faults(.|\n)*checksum"):
        check(str(shards), tmp_path / "out", 0, 0)
    (tmp_path / "manifest.json").unlink()
    shards.write_bytes(shards.read_bytes()[:3000])
    with pytest.raises(ValueError, match="breaks off"):
        check(str(shards), tmp_path / "out", 0, 0)


def test_shards_of_the_manifest_that_are_gone_and_other_totals_are_faults(shards, tmp_path):
    entries = [
        {"name": name, "sha256": hashlib.sha256(shards.read_bytes()).hexdigest()}
        for name in (shards.name, "train-000001.tar")
    ]
    manifest = {"splits": {"train": {"shards": entries, "images": 4, "masks": 3}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"1 faults(.|\n)*train-000001\.tar: .* it is absent"):
        check(str(tmp_path), tmp_path / "out", 0, 0)
    check(str(shards), tmp_path / "out", 0, 0)  # nobody asked for the other

    del entries[1]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"1 faults(.|\n)*train: .* states 4 images, .* hold 3"):
        check(str(tmp_path), tmp_path / "out", 0, 0)


def test_a_picture_that_cannot_be_written_is_no_fault_of_the_shard(shards, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("sam_train.convert.check.save_image", full)
    with pytest.raises(OSError, match="no space left"):
        check(str(shards), tmp_path / "out", 1, 0)


def test_every_fault_of_a_sample_is_named(make):
    files = encode_record(make.square("a"), suffix="png")
    content = json.loads(files["json"])
    good = content["annotations"][0]
    content["annotations"] = [
        good,
        good | {"area": 63},
        good | {"bbox": [0, 0, 3, 3]},
        good | {"predicted_iou": 3, "stability_score": -1},
        good | {"point_coords": [[99, 0]]},
        good | {"crop_box": [0, 0, 99, 9]},
        good | {"segmentation": {"size": [24, 32], "counts": [24 * 32]}},
        good | {"segmentation": {"size": [24, 32], "counts": "04"}},
        7,
    ]
    _, faults = check_sample({"png": files["png"][:-60], "json": json.dumps(content).encode()})
    expected = [
        "its image cannot be decoded",
        "annotation 1: its area is 63, that of its RLE 64",
        "annotation 2: its bbox is",
        "annotation 3: its predicted_iou is 3",
        "annotation 3: its stability_score is -1",
        "annotation 4: its point (99, 0) is outside",
        "annotation 5: its crop_box",
        "annotation 6: its mask is empty",
        "annotation 6: its area is 64, that of its RLE 0",
        "annotation 6: its bbox is",
        "annotation 7: the RLE is damaged",
        "annotation 8 is unusable",
    ]
    assert len(faults) == len(expected)
    for fault, start in zip(faults, expected, strict=True):
        assert fault.startswith(start)


def test_sa1bs_own_boxes_end_at_the_last_pixel_and_pass(make):
    files = encode_record(make.square("a"), suffix="png")
    content = json.loads(files["json"])
    x, y, width, height = content["annotations"][0]["bbox"]
    content["annotations"][0] |= {"bbox": [x, y, width - 1, height - 1], "predicted_iou": 1.02}
    assert check_sample(files | {"json": json.dumps(content).encode()})[1] == []


def test_no_shards_are_an_error_that_names_the_path(tmp_path):
    for run in (lambda p: check(p, tmp_path, 0, 0), lambda p: stats(p, tmp_path)):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            run(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("name", "images", "masks"), [("fruits_nuts", 15, 128)])
def test_real_shards_have_no_fault(real_set, tmp_path, name, images, masks):
    said = check(str(real_set(name)), tmp_path / "out", 1, 2)
    assert f"{images} images, {masks} masks in 2 shards" in said


def test_stats_counts_what_is_there(shards, tmp_path):
    table = stats(str(shards), tmp_path / "out")
    assert "3 images, 3 masks" in table and "3 medium" not in table
    found = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert found["quantiles"]["mask area, px"]["median"] == 64
    assert found["masks_by_size"]["small (< 32 x 32 px)"] == 3
    with Image.open(tmp_path / "out" / "stats.png") as plot:
        assert plot.size[0] > 300
