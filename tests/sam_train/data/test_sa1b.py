import functools
import http.server
import json
import logging
import pickle
import shutil
import threading
from collections import Counter

import numpy as np
import pytest

from sam_train.data import shards
from sam_train.data.sa1b import ShardSource, splits_by_shard
from sam_train.data.shards import encode_record
from sam_train.data.source import DamagedSampleError, UnusableSourceError, readable
from sam_train.data.transforms import ToSample


def keys(source, *, epoch=0, reader=0, num_readers=1, shuffle=False):
    return [
        record.key
        for record in source.records(
            epoch=epoch, reader=reader, num_readers=num_readers, shuffle=shuffle
        )
    ]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("counts", [[7], [3, 5], [2, 1, 3, 2], [1] * 17])
def test_readers_share_every_sample_exactly_once(tmp_path, make, counts, shuffle):
    expected = make.shards(tmp_path, counts)
    source = ShardSource(path=str(tmp_path), seed=3)
    for num_nodes, num_workers in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (2, 4), (5, 2)]:
        num_readers = num_nodes * num_workers
        seen = Counter()
        for reader in range(num_readers):
            seen.update(
                keys(source, epoch=1, reader=reader, num_readers=num_readers, shuffle=shuffle)
            )
        assert seen == Counter(expected), f"{num_readers} readers"


def test_whole_shards_are_dealt_out_only_where_that_is_fair():
    assert splits_by_shard(4, 2) and splits_by_shard(17, 2) and splits_by_shard(1, 1)
    assert not splits_by_shard(3, 2) and not splits_by_shard(1, 2)


def test_a_reader_opens_no_shard_but_its_own_where_they_suffice(tmp_path, make):
    make.shards(tmp_path, [2, 2])
    mine = keys(ShardSource(path=str(tmp_path)), reader=1, num_readers=2)
    assert mine == ["s1_0", "s1_1"]


def test_order_follows_from_seed_and_epoch_alone(tmp_path, make):
    make.shards(tmp_path, [20, 20])
    first = ShardSource(path=str(tmp_path), seed=1)
    again = ShardSource(path=str(tmp_path), seed=1)

    order = keys(first, epoch=2, shuffle=True)

    assert order == keys(first, epoch=2, shuffle=True) == keys(again, epoch=2, shuffle=True)
    assert order != keys(first, epoch=3, shuffle=True)
    assert order != keys(ShardSource(path=str(tmp_path), seed=2), epoch=2, shuffle=True)
    assert keys(first) == sorted(keys(first), key=lambda key: tuple(map(int, key[1:].split("_"))))


def test_readers_of_one_shard_together_give_the_order_of_a_single_one(tmp_path, make):
    make.shards(tmp_path, [11])
    source = ShardSource(path=str(tmp_path))
    alone = keys(source, shuffle=True)
    assert keys(source, reader=1, num_readers=3, shuffle=True) == alone[1::3]


def test_a_small_buffer_still_gives_everything_once(tmp_path, make):
    expected = make.shards(tmp_path, [30])
    order = keys(ShardSource(path=str(tmp_path), shuffle_buffer_mb=0.002), shuffle=True)
    assert sorted(order) == sorted(expected) and order != expected


@pytest.mark.parametrize(
    "pattern",
    ["part-*.tar", "part-{000000..000001}.tar", "", "part-000000.tar::{0}/part-000001.tar"],
)
def test_paths_globs_braces_and_folders_all_name_the_shards(tmp_path, make, pattern):
    expected = make.shards(tmp_path, [1, 2])
    path = str(tmp_path / pattern).replace("{0}", str(tmp_path))
    assert keys(ShardSource(path=path)) == expected
    assert keys(ShardSource(path=[path])) == expected


def test_a_name_with_braces_in_it_may_mean_itself(tmp_path, make):
    make.tar(tmp_path / "odd{1,2}[a].tar", make.files(make.square("a")))
    assert keys(ShardSource(path=str(tmp_path / "odd{1,2}[a].tar"))) == ["a"]


def test_a_file_url_is_read_as_webdataset_reads_it(tmp_path, make):
    expected = make.shards(tmp_path, [2])
    assert keys(ShardSource(path=(tmp_path / "part-000000.tar").as_uri())) == expected


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs with curl")
def test_a_url_is_read_as_webdataset_reads_it(tmp_path, make):
    expected = make.shards(tmp_path, [2, 1])
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/part-{{000000..000001}}.tar"
        found = keys(ShardSource(path=url))
        server.shutdown()
        thread.join()
    assert found == expected


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    "url", ["pipe:touch {}", "PIPE:touch {}", " pipe:touch {}", "a.tar::pipe:touch {}"]
)
def test_a_pipe_is_refused_before_anything_runs(tmp_path, url):
    source = ShardSource(path=url.format(tmp_path / "ran"))
    with pytest.raises(ValueError, match="allow_pipe"):
        keys(source)
    assert not (tmp_path / "ran").exists()


def test_webdatasets_rewriting_cannot_smuggle_a_pipe_in(tmp_path, monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", f"http://x=pipe:touch {tmp_path}/ran")
    with pytest.raises(ValueError, match="allow_pipe"):
        keys(ShardSource(path="http://x/a.tar"))
    assert not (tmp_path / "ran").exists()


def test_a_pipe_runs_when_asked_for(tmp_path, make):
    expected = make.shards(tmp_path, [2])
    path = f"pipe:cat {tmp_path}/part-000000.tar"
    assert keys(ShardSource(path=path, allow_pipe=True)) == expected


def bomb(path):
    """A pickle that makes a file when loaded."""
    return b"cos\nsystem\n(S'touch " + str(path).encode() + b"'\ntR."


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "npy", "pth", "json.pyd", "jpg.pkl"])
def test_nothing_in_a_shard_is_unpickled(tmp_path, make, suffix):
    files = make.files(make.square("a")) | {f"a.{suffix}": bomb(tmp_path / "ran")}
    make.tar(tmp_path / "a.tar", files)

    records = list(
        ShardSource(path=str(tmp_path)).records(epoch=0, reader=0, num_readers=1, shuffle=True)
    )

    assert records[0].image.shape == (24, 32, 3)
    assert not (tmp_path / "ran").exists()


def test_the_bomb_above_would_go_off(tmp_path):
    pickle.loads(bomb(tmp_path / "ran"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["nothing-*.tar", "nothing.tar", "nothing-{0..3}.tar", "empty"])
def test_a_path_without_shards_is_one_error_that_names_it(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        keys(ShardSource(path=str(tmp_path / path)))


DAMAGE = {
    "bad JSON": lambda files: files.update({"bad.json": b"{"}),
    "another size": lambda files: files.update(
        {"bad.json": files["bad.json"].replace(b"[24,32]", b"[24,31]")}
    ),
    "no JSON": lambda files: files.pop("bad.json"),
    "no image": lambda files: files.pop("bad.png"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sample_is_named_and_left_out(tmp_path, make, caplog, damage):
    files = make.files(make.square("bad"))
    DAMAGE[damage](files)
    make.tar(
        tmp_path / "a.tar",
        make.files(make.square("a")) | files | make.files(make.square("b")),
    )
    source = ShardSource(path=str(tmp_path), max_bad_fraction=0.5, name="mine")

    with caplog.at_level(logging.WARNING):
        assert keys(source) == ["a", "b"]

    assert "a.tar:bad" in caplog.text and "1 of 3 samples" in caplog.text
    with pytest.raises(
        UnusableSourceError, match=r"mine: 1 of \d.*a.tar:bad.*max_bad_fraction=0.3"
    ):
        keys(ShardSource(path=str(tmp_path), max_bad_fraction=0.3, name="mine"))


def test_a_corrupt_image_counts_when_it_is_looked_at(tmp_path, make, caplog):
    files = make.files(make.square("bad"))
    files["bad.png"] = files["bad.png"][:60]
    make.tar(tmp_path / "a.tar", files | make.files(make.square("a")))

    tolerant = ShardSource(path=str(tmp_path), max_bad_fraction=0.5)
    records = tolerant.records(epoch=0, reader=0, num_readers=1, shuffle=False)
    with pytest.raises(DamagedSampleError, match=r"a\.tar:bad"):
        next(records).image  # noqa: B018
    assert [record.key for record in readable(records)] == ["a"]
    assert "1 of 2 samples are damaged" in caplog.text

    strict = ShardSource(path=str(tmp_path), max_bad_fraction=0)
    with pytest.raises(UnusableSourceError):
        list(readable(strict.records(epoch=0, reader=0, num_readers=1, shuffle=False)))


def test_damaged_run_lengths_count_when_they_are_drawn(tmp_path, make, caplog):
    files = make.files(make.square("bad"))
    content = json.loads(files["bad.json"])
    content["annotations"][0]["segmentation"]["counts"] = "04"  # 4 of the pixels
    files["bad.json"] = json.dumps(content).encode()
    make.tar(tmp_path / "a.tar", files | make.files(make.square("a")))
    transform = ToSample(img_size=32, mask_size=16)

    def samples(max_bad_fraction):
        source = ShardSource(path=str(tmp_path), max_bad_fraction=max_bad_fraction)
        for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
            try:
                yield transform(record, 0).key
            except DamagedSampleError:
                continue

    assert list(samples(0.5)) == ["a"]
    assert "a.tar:bad is damaged" in caplog.text and "1 of 2 samples" in caplog.text
    with pytest.raises(UnusableSourceError, match="a.tar:bad"):
        list(samples(0))


def test_a_shard_that_breaks_off_is_counted_and_the_next_is_read(tmp_path, make, caplog):
    make.shards(tmp_path, [3, 2])
    broken = tmp_path / "part-000000.tar"
    broken.write_bytes(broken.read_bytes()[:4000])

    found = keys(ShardSource(path=str(tmp_path), max_bad_fraction=0.9))

    assert found[-2:] == ["s1_0", "s1_1"] and "s0_2" not in found
    assert str(broken) in caplog.text
    with pytest.raises(UnusableSourceError, match="part-000000"):
        keys(ShardSource(path=str(tmp_path), max_bad_fraction=0))


def test_cached_images_are_decoded_once_and_stay_behind_when_pickled(tmp_path, make, monkeypatch):
    make.shards(tmp_path, [2])
    source = ShardSource(path=str(tmp_path), cache_mb=1)
    decoded = []

    def counting(data, size):
        decoded.append(size)
        return shards.decode_image.original(data, size)

    counting.original = shards.decode_image
    monkeypatch.setattr(shards, "decode_image", counting)
    for epoch in range(3):
        for record in source.records(epoch=epoch, reader=0, num_readers=1, shuffle=True):
            assert record.image.shape == (24, 32, 3)
    assert len(decoded) == 2
    assert len(pickle.loads(pickle.dumps(source))._cache.images) == 0


def jpeg_files(record):
    return {f"{record.key}.{suffix}": data for suffix, data in encode_record(record).items()}


def test_the_cache_tells_the_scales_of_an_image_apart(tmp_path, make):
    make.tar(tmp_path / "a.tar", jpeg_files(make.square("a")))
    source = ShardSource(path=str(tmp_path), cache_mb=1)
    for _ in range(2):
        for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
            images = [np.asarray(record.reduced_image(shrink)[0]) for shrink in (4, 2, 1)]
            assert [image.shape for image in images] == [(6, 8, 3), (12, 16, 3), (24, 32, 3)]
            assert np.array_equal(images[2], record.image)
    assert len(source._cache.images) == 3


def test_an_image_that_cannot_be_decoded_at_a_reduced_size_is_counted(tmp_path, make, monkeypatch):
    make.tar(tmp_path / "a.tar", jpeg_files(make.square("a")))

    def fails(*_):
        raise ValueError("cut short")

    monkeypatch.setattr(shards, "decode_reduced", fails)
    source = ShardSource(path=str(tmp_path), max_bad_fraction=1)
    for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
        with pytest.raises(DamagedSampleError, match="cut short"):
            record.reduced_image(2)


def test_the_cache_keeps_to_its_size(tmp_path, make):
    make.shards(tmp_path, [4])
    source = ShardSource(path=str(tmp_path), cache_mb=2 * 24 * 32 * 3 / 2**20)
    for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
        record.image  # noqa: B018
    assert len(source._cache.images) == 2


@pytest.mark.parametrize(
    ("name", "images", "masks"), [("nuclei", 464, 19745), ("lung_xray", 96, 192)]
)
def test_real_shards_hold_what_they_should(real_set, name, images, masks):
    source = ShardSource(path=f"{real_set(name)}/train-*.tar", max_bad_fraction=0)
    records = list(source.records(epoch=0, reader=0, num_readers=1, shuffle=False))
    assert len(records) == images
    assert sum(len(record.annotations) for record in records) == masks
    assert records[0].image.shape == (*records[0].size, 3)
