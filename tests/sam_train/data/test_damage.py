"""A thousand damaged samples of twenty kinds through the data module's real workers."""

from __future__ import annotations

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from sam_train.data.datamodule import SamDataModule
from sam_train.data.sa1b import ShardSource
from sam_train.data.shards import encode_record
from sam_train.data.source import UnusableSourceError, readable
from sam_train.data.transforms import ToSample

Files = dict[str, bytes]
PER_KIND = 50


def image_of(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def in_json(change: Callable[[dict], object]) -> Callable[[Files], object]:
    """A damage to the parsed JSON."""

    def damage(files: Files) -> None:
        content = json.loads(files["json"])
        change(content)
        files["json"] = json.dumps(content).encode()

    return damage


def annotation(**changes: object) -> Callable[[Files], object]:
    return in_json(lambda content: content["annotations"][0].update(changes))


def segmentation(**changes: object) -> Callable[[Files], object]:
    return in_json(lambda content: content["annotations"][0]["segmentation"].update(changes))


def stated(**changes: object) -> Callable[[Files], object]:
    return in_json(lambda content: content["image"].update(changes))


def cut_counts(content: dict) -> None:
    run_lengths = content["annotations"][0]["segmentation"]
    run_lengths["counts"] = run_lengths["counts"][:-3]


def huge_with_its_mask(content: dict) -> None:
    """A size that image and mask state alike, and that none of them has."""
    content["image"].update(height=10**6, width=10**6)
    content["annotations"][0]["segmentation"]["size"] = [10**6, 10**6]


# What happens to a sample, and what the log says of it.
OF_A_SAMPLE: dict[str, tuple[Callable[[Files], object], str]] = {
    "JPEG cut short": (lambda f: f.update(jpg=f["jpg"][:-40]), "decoded"),
    "JPEG of other bytes": (lambda f: f.update(jpg=b"no picture" * 9), "decoded"),
    "empty JPEG": (lambda f: f.update(jpg=b""), "decoded"),
    "JPEG of another size": (lambda f: f.update(jpg=image_of(20, 20)), "20 x 20"),
    "empty JSON": (lambda f: f.update(json=b""), "does not parse"),
    "broken JSON": (lambda f: f.update(json=f["json"][:-9]), "does not parse"),
    "JSON nested too deep": (lambda f: f.update(json=b"[" * 100_000), "does not parse"),
    "JSON that is a list": (lambda f: f.update(json=b"[1]"), "no object `image`"),
    "no annotations": (in_json(lambda c: c.pop("annotations")), "no list `annotations`"),
    "annotation that is none": (in_json(lambda c: c.update(annotations=[3])), "no `segmentation`"),
    "RLE of another size": (segmentation(size=[32, 24]), "RLE is 32 x 24"),
    "RLE cut short": (in_json(cut_counts), "RLE is damaged"),
    "RLE of other characters": (segmentation(counts="zz~"), "RLE is damaged"),
    "counts that are a number": (segmentation(counts=7), "counts are a string or a list"),
    "an empty RLE": (segmentation(counts=[24 * 32]), "no pixel in its own bbox"),
    "box outside": (annotation(bbox=[-5, 0, 9, 9]), "outside the image"),
    "box that is no number": (annotation(bbox=[0, 0, None, 9]), "annotation 0 is unusable"),
    "area that is no number": (annotation(area=float("nan")), "finite number"),
    "infinite id": (annotation(id=float("inf")), "annotation 0 is unusable"),
    "no image": (lambda f: f.pop("jpg"), "no image"),
    "no JSON": (lambda f: f.pop("json"), "no .json"),
    "no width": (stated(width=0), "no size"),
    "huge size stated": (in_json(huge_with_its_mask), "its JSON says 1000000 x 1000000"),
}
# What happens to a shard of two good samples and one that is lost.
OF_A_SHARD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "tar cut short": (lambda data: data[: lost_sample(data) + 700], "breaks off"),
    "tar overwritten": (
        lambda data: data[: lost_sample(data)] + b"\xff" * 512 + data[lost_sample(data) + 512 :],
        "breaks off",
    ),
}
WITHOUT_SAMPLES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "no tar file"),
    "empty tar": (bytes(10240), "no image and no JSON"),
}


def lost_sample(data: bytes) -> int:
    return data.index(b"lost")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, make):
    """A folder of shards, the good keys in it, and what the log must say of each bad name."""
    folder, good, expected = tmp_path_factory.mktemp("damaged"), [], {}

    def sample(key: str, damage: Callable[[Files], object] = lambda files: None) -> Files:
        files = encode_record(make.square(key), suffix="jpg")
        damage(files)
        return {f"{key}.{suffix}": data for suffix, data in files.items()}

    def good_sample() -> Files:
        good.append(f"good{len(good)}")
        return sample(good[-1])

    for number in range(PER_KIND):
        files: Files = {}
        for kind, (damage, reason) in OF_A_SAMPLE.items():
            key = f"{re.sub(r'[^a-zA-Z]', '_', kind)}_{number}"
            expected[f"/s{number:03d}.tar:{key} "] = reason
            files |= sample(key, damage) | good_sample()
        make.tar(folder / f"s{number:03d}.tar", files)
        for index, (change, reason) in enumerate(OF_A_SHARD.values()):
            path = folder / f"broken{index}_{number}.tar"
            make.tar(path, good_sample() | good_sample() | sample("lost"))
            path.write_bytes(change(path.read_bytes()))
            expected[f"/{path.name} "] = reason
        for index, (data, reason) in enumerate(WITHOUT_SAMPLES.values()):
            path = folder / f"empty{index}_{number}.tar"
            path.write_bytes(data)
            expected[f"/{path.name} "] = reason
    return folder, good, expected


@pytest.fixture
def log_file(tmp_path) -> Iterator:
    """A file that the workers log to as well, as they do to a run's train.log."""
    handler = logging.FileHandler(tmp_path / "train.log")
    logging.getLogger().addHandler(handler)
    yield tmp_path / "train.log"
    logging.getLogger().removeHandler(handler)
    handler.close()


def module(source: ShardSource, num_workers: int) -> SamDataModule:
    return SamDataModule(
        train=source,
        val=ShardSource(path=source.path, name="val", max_bad_fraction=source.max_bad_fraction),
        train_transform=ToSample(img_size=32, mask_size=16),
        batch_size=4,
        num_workers=num_workers,
        max_val_masks=None,
    )


def test_there_are_a_thousand_damaged_samples_of_twenty_kinds(damaged):
    _, good, expected = damaged
    assert len(expected) >= 1000
    assert len(OF_A_SAMPLE) + len(OF_A_SHARD) + len(WITHOUT_SAMPLES) >= 20
    assert len(good) >= 1000


def test_every_damaged_sample_is_named_and_every_other_one_arrives(damaged, log_file):
    folder, good, expected = damaged
    data = module(ShardSource(path=str(folder), max_bad_fraction=0.9, seed=5), num_workers=2)
    loader = data.train_dataloader()

    arrived: Counter[str] = Counter()
    epochs = {0: 0, 1: 0}
    for batch in loader:
        reader, position = loader.delivered[-1]
        epochs[reader] = position.epoch
        arrived.update(batch.keys)
        if min(epochs.values()) > 0:  # both readers have ended their first pass
            break

    assert set(arrived) == set(good)
    text = log_file.read_text()
    lines = [line for line in text.splitlines() if " is damaged and left out: " in line]
    unnamed = [
        f"{name}: {reason}"
        for name, reason in expected.items()
        if not any(name in line and reason in line for line in lines)
    ]
    assert unnamed == []
    assert [line for line in lines if not any(name in line for name in expected)] == []
    ended = re.findall(r"(\d+) of (\d+) samples are damaged", text)
    bad, seen = (sum(map(int, numbers)) for numbers in zip(*ended[:2], strict=True))
    assert (bad, seen) == (len(expected), len(expected) + len(good))


def test_validation_names_what_it_cannot_decode_too(damaged, caplog):
    folder, good, _ = damaged
    data = module(ShardSource(path=str(folder), max_bad_fraction=0.9), num_workers=0)
    keys = {record.key for record in data.val_dataloader()}
    # What is wrong with run lengths shows where masks are drawn.
    kinds = {re.sub(r"_\d+$", "", key) for key in keys - set(good)}
    drawn_later = {
        kind for kind in OF_A_SAMPLE if re.search("^RLE (?!of another)|counts|empty RLE", kind)
    }
    assert kinds == {re.sub(r"[^a-zA-Z]", "_", kind) for kind in drawn_later}
    assert set(good) <= keys
    assert "is damaged and left out" in caplog.text


def test_past_max_bad_fraction_there_is_one_clear_error(damaged):
    folder, _, _ = damaged
    data = module(ShardSource(path=str(folder), max_bad_fraction=0.2, name="mine"), num_workers=2)
    with pytest.raises(
        UnusableSourceError, match=r"^mine: \d+ of \d+ samples .*max_bad_fraction=0\.2"
    ) as raised:
        for _ in data.train_dataloader():
            pass
    assert "Traceback" not in str(raised.value)


def test_a_key_that_comes_twice_is_two_samples(tmp_path, make, caplog):
    files = make.files(make.square("a"))
    # Two files of one name in a tar: written one after the other.
    make.tar(tmp_path / "0.tar", files)
    twice = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")
    padded = twice + bytes(-len(twice) % 512)
    (tmp_path / "0.tar").write_bytes(padded + padded + bytes(1024))
    records = ShardSource(path=str(tmp_path)).records(
        epoch=0, reader=0, num_readers=1, shuffle=False
    )
    assert [record.key for record in readable(records)] == ["a", "a"]
    assert caplog.text == ""


def test_a_large_image_raises_no_warning_and_a_bomb_is_damage(tmp_path, make, monkeypatch):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 24 * 32 - 1
    )  # a warning, an error from twice that on
    make.tar(tmp_path / "0.tar", make.files(make.square("a")))
    make.tar(tmp_path / "1.tar", make.files(make.square("bomb", (64, 64))))
    records = ShardSource(path=str(tmp_path), max_bad_fraction=0.5).records(
        epoch=0, reader=0, num_readers=1, shuffle=False
    )
    assert [record.key for record in readable(records)] == ["a"]
