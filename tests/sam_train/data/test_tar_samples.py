"""Samples of tar files: places to go on from, and files that tarfile would call whole."""

import gzip
import io
import tarfile

import fsspec
import pytest

from sam_train.data.sa1b import ShardSource
from sam_train.data.tar_samples import BrokenTarError, read_samples


def tar_of(*names: str, size: int = 700) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = size
            tar.addfile(entry, io.BytesIO(name.encode().ljust(size, b".")))
    return buffer.getvalue()


THREE = ("a.jpg", "a.json", "notes.txt", "b.json", "b.jpg", "x/c.JPG", "x/c.json")


def read(path, start=0):
    return list(read_samples(str(path), lambda name: not name.endswith(".txt"), start))


@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_tells_where_the_next_one_begins(tmp_path, packed):
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(tar_of(*THREE)) if packed else tar_of(*THREE))

    samples = read(path)

    assert [(sample.key, sorted(sample.files)) for sample in samples] == [
        ("a", ["jpg", "json"]),
        ("b", ["jpg", "json"]),
        ("x/c", ["jpg", "json"]),
    ]
    for number, sample in enumerate(samples):
        assert read(path, sample.end) == samples[number + 1 :]


def test_a_start_is_sought_and_nothing_before_it_is_read(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(*THREE))
    samples = read(path)
    content = path.read_bytes()
    path.write_bytes(b"?" * samples[0].end + content[samples[0].end :])
    assert read(path, samples[0].end) == samples[1:]


def test_a_key_that_comes_twice_is_two_samples(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of("a.jpg", "a.json", "a.jpg", "a.json"))
    assert [sample.key for sample in read(tmp_path / "a.tar")] == ["a", "a"]


def test_what_macos_puts_beside_a_file_does_not_part_a_sample(tmp_path):
    names = ("./._a.jpg", "./a.jpg", "./._a.json", "./a.json", "./x/._b.jpg", "./x/b.jpg")
    (tmp_path / "a.tar").write_bytes(tar_of(*names))
    found = [(sample.key, sorted(sample.files)) for sample in read(tmp_path / "a.tar")]
    assert found == [("a", ["jpg", "json"]), ("x/b", ["jpg"])]


BREAKS = {
    "within a file": lambda content: content[:2000],
    "between two files": lambda content: content[: 2 * 1536],
    "within a header": lambda content: content[: 2 * 1536 + 100],
    "a header overwritten": lambda content: content[:3072] + b"\xff" * 512 + content[3584:],
    "nothing": lambda content: b"",
    "no tar": lambda content: b"once upon a time " * 100,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", BREAKS)
def test_a_tar_that_is_not_whole_says_so_after_what_is_whole(tmp_path, how, packed):
    content = BREAKS[how](tar_of("a.jpg", "a.json", "b.jpg", "b.json"))
    (tmp_path / "a.tar").write_bytes(gzip.compress(content) if packed else content)
    found = []
    with pytest.raises(BrokenTarError):
        for sample in read_samples(str(tmp_path / "a.tar"), lambda name: True):
            found.append(sample.key)  # what came before the error counts
    assert found in ([], ["a"])
    assert found or how not in ("between two files", "within a header", "a header overwritten")


@pytest.mark.parametrize("num_zeros", [512, 3 * 1536])
def test_a_hole_of_zeros_is_no_end(tmp_path, num_zeros):
    content = tar_of("a.jpg", "a.json", *(f"b{i}.jpg" for i in range(9)))
    content = content[:3072] + b"\0" * num_zeros + content[3072 + num_zeros :]
    (tmp_path / "a.tar").write_bytes(content)
    found = []
    with pytest.raises(BrokenTarError, match=r"breaks off at byte 3072: .* again from byte \d+ on"):
        for sample in read_samples(str(tmp_path / "a.tar"), lambda name: True):
            found.append(sample.key)
    assert found == ["a"]
    with pytest.raises(BrokenTarError, match="at byte 3072"):
        read(tmp_path / "a.tar", 3072)


def test_a_tar_that_goes_on_in_zeros_is_an_unfinished_download(tmp_path):
    content = tar_of("a.jpg", "a.json")
    (tmp_path / "a.tar").write_bytes(content + bytes(2**20 - len(content)))
    assert len(read(tmp_path / "a.tar")) == 1
    (tmp_path / "a.tar").write_bytes(content + bytes(3 * 2**20))
    with pytest.raises(BrokenTarError, match=r"ends in \d{7} bytes of zeros: an unfinished"):
        read(tmp_path / "a.tar")


def test_a_shard_of_object_storage_is_listed_and_read_from_any_sample_on():
    bucket = fsspec.filesystem("memory")
    for name in ("b", "a"):
        bucket.pipe_file(f"/samples/{name}.tar", tar_of(*THREE))
    bucket.pipe_file("/samples/readme.txt", b"not a shard")
    both = ["memory:///samples/a.tar", "memory:///samples/b.tar"]

    assert ShardSource(path="memory://samples").shards() == both
    assert ShardSource(path="memory://samples/*.tar").shards() == both
    first, *others = read("memory://samples/a.tar")
    assert [sample.key for sample in others] == ["b", "x/c"]
    assert read("memory://samples/a.tar", first.end) == others
    with pytest.raises(FileNotFoundError):
        read("memory://samples/c.tar")
