"""A checkpoint tells the data that it was trained on from other data under the same names."""

import json
import logging
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from sam_train.data.coco import CocoItems
from sam_train.data.datamodule import SamDataModule
from sam_train.data.fingerprint import fingerprint
from sam_train.data.folder import FolderItems
from sam_train.data.image_pairs import PairItems
from sam_train.data.indexed import IndexedSource
from sam_train.data.mixture import MixtureSource
from sam_train.data.sa1b import ShardSource
from sam_train.data.source import HeldOut
from sam_train.data.synthetic import SyntheticSource
from sam_train.data.transforms import ToSample

NAMES = ("a", "b", "c")


def shards(folder, make):
    make.shards(folder, [3, 4])
    return lambda root: ShardSource(path=str(root))


def coco(folder, make):
    box = [[2, 2, 9, 2, 9, 9, 2, 9]]
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate(NAMES)]
    annotations = [{"id": i, "image_id": i, "segmentation": box} for i in range(len(NAMES))]
    (folder / "f.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    for name in NAMES:
        Image.new("RGB", (16, 12)).save(folder / f"{name}.png")
    return lambda root: IndexedSource(
        items=CocoItems(images=str(root), annotations=str(root / "f.json"))
    )


def folders(folder, make):
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
        for name in NAMES:
            Image.fromarray(np.eye(12, 16, dtype=np.uint8)).save(folder / kind / f"{name}.png")
    return lambda root: IndexedSource(
        items=FolderItems(images=str(root / "images"), masks=str(root / "masks"))
    )


def pairs(folder, make):
    for name in NAMES:
        for file, data in make.files(make.record(name, np.eye(8, dtype=bool)[None])).items():
            (folder / file).write_bytes(data)
    return lambda root: IndexedSource(items=PairItems(path=str(root)))


def grow_a_shard(root):
    with (root / "part-000000.tar").open("ab") as file:
        file.write(bytes(10240))


def rename_an_image_in_the_json(root):
    text = (root / "f.json").read_text()
    (root / "f.json").write_text(text.replace("b.png", "d.png"))


def rename_an_image(root):
    for kind in ("images", "masks"):
        (root / kind / "b.png").rename(root / kind / "d.png")


def replace_an_image(root):
    Image.new("RGB", (300, 200), "red").save(root / "images" / "b.png")


def replace_a_json(root):
    path = root / "b.json"
    path.write_text(path.read_text() + " ")


@pytest.fixture
def module():
    def build(source):
        return SamDataModule(
            train=source,
            val=source,
            train_transform=ToSample(img_size=32, mask_size=16, max_masks=4),
            batch_size=1,
        )

    return build


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (shards, grow_a_shard),
        (coco, rename_an_image_in_the_json),
        (folders, rename_an_image),
        (folders, replace_an_image),
        (pairs, replace_a_json),
    ],
)
def test_other_data_under_the_same_names_is_gone_on_with_at_the_next_epoch_and_that_is_said_once(
    tmp_path, make, module, caplog, write, change
):
    (tmp_path / "here").mkdir()
    source = write(tmp_path / "here", make)
    state = module(source(tmp_path / "here")).state_dict()

    # As it is after a copy: elsewhere, and of now.
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    os.utime(next((tmp_path / "there").iterdir()), (1, 1))
    moved = module(source(tmp_path / "there"))
    moved.load_state_dict(state)
    assert moved.state_dict() == state and not caplog.text

    change(tmp_path / "there")
    other = module(source(tmp_path / "there"))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state)
    assert other.state_dict()["readers"] == [(1, ())]
    assert caplog.text.count("the data's files are not those of before") == 1
    assert "going on at the start of epoch 1" in caplog.text


def test_a_checkpoint_from_before_sizes_counted_is_gone_on_from(tmp_path, make, module, caplog):
    source = shards(tmp_path, make)(tmp_path)
    state = {name: one for name, one in module(source).state_dict().items() if name != "files"}
    grow_a_shard(tmp_path)
    module(source).load_state_dict(state)
    assert not caplog.text


def test_parts_and_mixtures_are_told_apart_by_the_files_of_all_their_sources(tmp_path, make):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = (
        shards(tmp_path / "a", make)(tmp_path / "a"),
        coco(tmp_path / "b", make)(tmp_path / "b"),
    )
    part = HeldOut(source=two, share=0.5, keep="rest")
    assert fingerprint(part) == fingerprint(two)
    found = [
        fingerprint(source) for source in (one, two, MixtureSource(sources={"a": one, "b": part}))
    ]
    assert len(set(found)) == 3 and all(found)
    rename_an_image_in_the_json(tmp_path / "b")
    again = IndexedSource(
        items=CocoItems(images=str(tmp_path / "b"), annotations=str(tmp_path / "b" / "f.json"))
    )
    assert fingerprint(MixtureSource(sources={"a": one, "b": again})) not in found


def test_a_folder_is_the_same_however_its_path_is_written(tmp_path, make, monkeypatch):
    pairs(tmp_path, make)
    monkeypatch.chdir(tmp_path)
    paths = (str(tmp_path), ".", f"./../{tmp_path.name}", f"{tmp_path}//")
    assert len({fingerprint(IndexedSource(items=PairItems(path=path))) for path in paths}) == 1


def test_what_has_no_files_has_no_fingerprint_and_a_url_counts_by_its_name():
    assert fingerprint(SyntheticSource(split="train", num_scenes=2)) == ""
    urls = [f"http://{host}/{name}.tar" for host, name in (("x", "a"), ("y", "a"), ("y", "b"))]
    found = [fingerprint(ShardSource(path=url)) for url in urls]
    assert [one == other for one, other in pairwise(found)] == [True, False]


def test_a_thousand_shards_are_asked_for_their_size_once_each(tmp_path, monkeypatch):
    for number in range(1000):
        (tmp_path / f"{number}.tar").touch()
    asked = []
    monkeypatch.setattr(os.path, "getsize", lambda path: asked.append(path) or 0)
    fingerprint(ShardSource(path=str(tmp_path)))
    assert len(asked) == len(set(asked)) == 1000
