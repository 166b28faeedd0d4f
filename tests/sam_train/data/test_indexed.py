import pickle
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from sam_train.data.file_lists import Names, files_below
from sam_train.data.image_pairs import PairItems, sa1b_source
from sam_train.data.indexed import IndexedSource
from sam_train.data.sa1b import ShardSource
from sam_train.data.shards import encode_record
from sam_train.data.source import DamagedSampleError, UnusableSourceError, readable
from sam_train.data.transforms import ToSample


@pytest.fixture
def squares(make):
    """Builds `Items` of so many squares, some of them damaged."""

    @dataclass(frozen=True)
    class Squares:
        count: int
        bad: tuple[int, ...] = ()
        error: Exception = ValueError("it is broken")

        def __len__(self):
            return self.count

        def describe(self, index):
            return f"k{index}"

        def record(self, index):
            if index in self.bad:
                raise self.error
            return make.square(f"k{index}")

    return Squares


def records(source, *, epoch=0, reader=0, num_readers=1, shuffle=True, start=()):
    return list(
        source.records(
            epoch=epoch, reader=reader, num_readers=num_readers, shuffle=shuffle, start=start
        )
    )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_readers", [1, 2, 5])
def test_readers_share_every_image_exactly_once(squares, num_readers, shuffle):
    source = IndexedSource(items=squares(13))
    seen = Counter(
        record.key
        for reader in range(num_readers)
        for record in records(source, reader=reader, num_readers=num_readers, shuffle=shuffle)
    )
    assert seen == Counter(f"k{index}" for index in range(13))


def test_the_order_follows_from_seed_and_epoch(squares):
    one, other = (IndexedSource(items=squares(20), seed=seed) for seed in (1, 2))
    keys = [[r.key for r in records(one, epoch=epoch)] for epoch in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] != [r.key for r in records(other)]


@pytest.mark.parametrize("num_readers", [1, 2])
def test_it_goes_on_from_any_cursor_with_the_damage_it_had_met(squares, num_readers, caplog):
    source = IndexedSource(items=squares(12, bad=(3, 4)), max_bad_fraction=1)
    whole = records(source, num_readers=num_readers)
    caplog.clear()
    records(source, num_readers=num_readers)
    said = caplog.messages[-1:]
    for at in range(1, len(whole)):
        caplog.clear()
        rest = records(source, num_readers=num_readers, start=whole[at - 1].cursor)
        assert [(r.key, r.cursor) for r in rest] == [(r.key, r.cursor) for r in whole[at:]]
        assert caplog.messages[-1:] == said


@pytest.mark.parametrize("error", [ValueError("it is broken"), KeyError("size"), OSError("gone")])
def test_damage_is_named_counted_and_judged(squares, caplog, error):
    items = squares(10, bad=(2,), error=error)
    assert len(records(IndexedSource(items=items, max_bad_fraction=0.1))) == 9
    assert "k2 is damaged" in caplog.text and "1 of 10" in caplog.text
    with pytest.raises(UnusableSourceError, match="mine: 1 of 10 .*k2"):
        records(IndexedSource(items=items, max_bad_fraction=0.05, name="mine"))


def test_names_are_a_sequence_of_texts(tmp_path):
    texts = ["a", "", "ü/b c.png", "z" * 300]
    names = Names(texts)
    assert list(names) == texts and names[-1] == texts[-1] and list(names[1:3]) == texts[1:3]
    assert list(pickle.loads(pickle.dumps(names))) == texts
    with pytest.raises(IndexError):
        names[4]


def test_files_are_found_at_any_depth_and_by_globs(tmp_path):
    for name in ("1/images/a.PNG", "1/masks/b.png", "2/images/c/d.png", "1/images/.e.png", "x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = files_below(str(tmp_path / "*" / "images"), {".png"})
    assert found == (str(tmp_path), ["1/images/a.PNG", "2/images/c/d.png"])
    assert len(files_below(str(tmp_path), {".png"})[1]) == 3
    for absent in ("nowhere", "nowhere*"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            files_below(str(tmp_path / absent), {".png"})


def unpack(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_an_unpacked_folder_of_sa1b_reads_as_its_tar(tmp_path, make, caplog):
    files = make.files(make.square("sa_1")) | make.files(make.square("sa_2"))
    make.tar(tmp_path / "a.tar", files)
    unpack(tmp_path / "set" / "sa_000000", files)
    lone = make.files(make.square("sa_3"))
    unpack(tmp_path / "set" / "sa_000001", {"sa_3.json": lone["sa_3.json"]})

    from_tar = records(ShardSource(path=str(tmp_path / "a.tar")), shuffle=False)
    source = sa1b_source(path=str(tmp_path / "set"), max_bad_fraction=0.5, allow_pipe=False)
    unpacked = list(readable(records(source, shuffle=False)))

    assert isinstance(source, IndexedSource)
    assert [r.key for r in unpacked] == ["sa_000000/sa_1", "sa_000000/sa_2"]
    assert [r.annotations for r in unpacked] == [r.annotations for r in from_tar]
    assert (unpacked[0].image == from_tar[0].image).all()
    assert unpacked[0].read_file() == files["sa_1.png"]
    assert "sa_000001/sa_3 is damaged" in caplog.text


def test_tars_stay_tars(tmp_path, make):
    make.tar(tmp_path / "a.tar", make.files(make.square("a")))
    unpack(tmp_path, {"manifest.json": b"{}"})
    for path in (str(tmp_path), str(tmp_path / "*.tar"), [str(tmp_path)], "nowhere"):
        assert isinstance(sa1b_source(path=path, shuffle_buffer_mb=1), ShardSource)
    assert sa1b_source(path=str(tmp_path / "x")) == sa1b_source(path=str(tmp_path / "x"))
    assert PairItems(path="a") == PairItems(path="a") != PairItems(path="b")


def test_a_jpeg_that_cannot_be_decoded_at_a_reduced_scale_is_counted(tmp_path, make, caplog):
    mask = np.zeros((1, 256, 256), bool)
    mask[:, 60:200, 60:200] = True
    for key in ("a", "bad"):
        files = encode_record(make.record(key, mask), suffix="jpg")
        files["jpg"] = files["jpg"][: len(files["jpg"]) // (2 if key == "bad" else 1)]
        for suffix, data in files.items():
            (tmp_path / f"{key}.{suffix}").write_bytes(data)
    source = sa1b_source(path=str(tmp_path), max_bad_fraction=1)
    transform = ToSample(img_size=64, mask_size=32)

    made, damaged = [], []
    for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
        try:
            made.append(transform(record, 0).key)
        except DamagedSampleError:
            damaged.append(record.key)

    assert (made, damaged) == (["a"], ["bad"])
    assert "bad" in caplog.text and "1 of 2 samples are damaged" in caplog.text
