"""Images are registered once each, by what is in them, and are found again where they lie."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image as Pillow

from data_engine.image_finding import find_images
from data_engine.images import ImageGoneError, image_bytes, image_pixels, register
from data_engine.mask_store.lineage import take_down
from data_engine.mask_store.store import Store
from data_engine.records import Image


def picture(seed: int, *, size: tuple[int, int] = (24, 40), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """one.png, deep/two.jpg, deep/one.png (another picture), copy.png (of one.png), cut.jpg (half a file)."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    (root / "one.png").write_bytes(picture(1))
    (root / "copy.png").write_bytes(picture(1))
    (root / "deep" / "two.jpg").write_bytes(picture(2, kind="JPEG"))
    (root / "deep" / "one.png").write_bytes(picture(3, size=(16, 16)))
    (root / "cut.jpg").write_bytes(picture(4, kind="JPEG")[:-600])
    return root


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_folder_is_registered_and_what_is_broken_or_twice_is_named(
    store: Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = register(store, find_images(str(folder)))

    assert result.num_new == 3
    assert result.duplicates == [(str(folder / "one.png"), "copy")]
    ((broken, reason),) = result.broken
    assert broken == str(folder / "cut.jpg") and "decoded" in reason
    assert "cut.jpg is left out" in caplog.text and "one.png is left out" in caplog.text
    by_key = {image.key: image for image in store.images()}
    assert set(by_key) == {"copy", "one", "two"}
    assert by_key["two"].size == (24, 40)
    assert by_key["one"].path == str(folder / "deep" / "one.png")


def test_registering_again_adds_only_what_is_new(store: Store, folder: Path) -> None:
    register(store, find_images(str(folder)))
    (folder / "new.png").write_bytes(picture(5))

    result = register(store, find_images(f"{folder}/**/*.png"))

    assert (result.num_new, result.num_known, len(result.duplicates)) == (1, 2, 1)


def test_different_images_of_one_name_get_keys_of_their_own(store: Store, folder: Path) -> None:
    (folder / "copy.png").unlink()

    register(store, find_images(str(folder)))

    keys = sorted(image.key for image in store.images())
    assert keys[:1] == ["one"] and keys[1].startswith("one-") and keys[2] == "two"


def test_images_that_were_moved_are_found_at_their_new_place(store: Store, folder: Path) -> None:
    register(store, find_images(str(folder)))
    moved = folder.rename(folder.with_name("moved"))
    image = next(image for image in store.images() if image.key == "two")
    with pytest.raises(ImageGoneError, match="two.jpg cannot be read.*register the images again"):
        image_bytes(image)

    result = register(store, find_images(str(moved)))

    assert (result.num_new, len(result.moved)) == (0, 3)
    assert image_bytes(store.image(image.id)) == (moved / "deep" / "two.jpg").read_bytes()


def test_an_image_that_has_changed_is_not_taken_for_the_registered_one(
    store: Store, folder: Path
) -> None:
    register(store, find_images(str(folder)))
    (folder / "deep" / "two.jpg").write_bytes(picture(9, kind="JPEG"))

    with pytest.raises(ImageGoneError, match="has changed"):
        image_bytes(next(image for image in store.images() if image.key == "two"))


def test_images_of_shards_are_registered_and_read_where_they_lie(
    store: Store, tmp_path: Path
) -> None:
    first = {
        "a.png": picture(1),
        "a.json": b"{}",
        "b.jpg": picture(2, kind="JPEG"),
        "b.json": b"{}",
    }
    write_shard(tmp_path / "0.tar", first)
    write_shard(tmp_path / "1.tar", {"c.json": b"{}", "d.png": picture(3)})

    result = register(store, find_images(str(tmp_path)))

    assert result.num_new == 3
    assert [name for name, _ in result.broken] == [f"{tmp_path}/1.tar:c"]
    for key, data in (("a", picture(1)), ("b", first["b.jpg"]), ("d", picture(3))):
        (image,) = store.images_by_key([key]).values()
        assert image_bytes(image) == data
        assert image_pixels(image).shape == (24, 40, 3)


def test_a_shard_that_breaks_off_is_named_and_what_was_before_is_kept(
    store: Store, tmp_path: Path
) -> None:
    path = write_shard(tmp_path / "0.tar", {"a.png": picture(1), "b.png": picture(2)})
    path.write_bytes(path.read_bytes()[: 512 + len(picture(1)) // 512 * 512 + 1024 + 300])

    result = register(store, find_images(str(path)))

    assert result.num_new == 1
    assert result.broken[-1][0] == str(path) and "breaks off" in result.broken[-1][1]


def test_a_removed_shard_is_named_when_its_image_is_read(store: Store, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", {"a.png": picture(1)})
    register(store, find_images(str(path)))
    path.unlink()

    with pytest.raises(ImageGoneError, match=r"a.png of .*0.tar cannot be read"):
        image_bytes(next(store.images()))


def test_the_images_of_a_coco_file_are_registered(store: Store, folder: Path) -> None:
    names = ["one.png", "elsewhere/two.jpg", "absent.png", "../out.png"]
    entries = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    path = folder.parent / "instances.json"
    path.write_text(json.dumps({"images": entries, "annotations": []}))

    result = register(store, find_images(str(folder), str(path)))

    assert sorted(image.key for image in store.images()) == ["one", "two"]
    reasons = dict(result.broken)
    assert "no image absent.png" in reasons["absent.png"]
    assert "leads out" in reasons["../out.png"]


def test_an_image_that_was_taken_down_is_named_and_left_out(store: Store, folder: Path) -> None:
    register(store, find_images(str(folder)))
    image = next(image for image in store.images() if image.key == "two")
    take_down(store, image.id, reason="asked to", who="carla", now=1.0)

    result = register(store, find_images(str(folder)))

    assert result.taken_down == [str(folder / "deep" / "two.jpg")]
    assert (result.num_new, store.num_images()) == (0, 2)


def test_the_held_out_share_is_the_same_whatever_the_order(store: Store, tmp_path: Path) -> None:
    for seed in range(60):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed, size=(4, 4)))
    found = list(find_images(str(tmp_path)))

    register(store, found[:30][::-1], held_out=0.25)
    register(store, found, held_out=0.25)

    held_out = {image.id for image in store.images(held_out=True)}
    assert held_out == {i.id for i in store.images() if int(i.id[:8], 16) < 2**30}
    assert 5 <= len(held_out) <= 25


@pytest.mark.parametrize(
    ("files", "place", "reason"),
    [
        ([], "absent", "there is no such folder"),
        (["notes.txt"], "", "holds no image"),
        (["a.tar", "a.jpg"], "", "holds shards and images"),
    ],
)
def test_what_holds_no_image_is_refused(
    tmp_path: Path, files: list[str], place: str, reason: str
) -> None:
    for name in files:
        (tmp_path / name).touch()

    with pytest.raises((FileNotFoundError, ValueError), match=reason):
        list(find_images(str(tmp_path / place)))


def test_the_shards_of_a_real_set_register_once(store: Store, shared_data: Path) -> None:
    shards = sorted((shared_data / "fruits_nuts").glob("*.tar"))
    if not shards:
        pytest.skip("fruits_nuts is not among the data sets")

    assert register(store, find_images([str(shard) for shard in shards])).num_new == 15
    assert register(store, find_images(str(shared_data / "fruits_nuts"))).num_known == 15
    assert {image.size for image in store.images()} == {(600, 800)}


def test_two_who_register_images_of_one_name_at_once_both_succeed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scan.png").write_bytes(picture(seed))
    asked = store.images_by_key

    def asked_as_another_registers(keys: Sequence[str]) -> dict[str, Image]:
        found = asked(keys)
        monkeypatch.setattr(store, "images_by_key", asked)
        register(store, find_images(str(tmp_path / "b")))
        return found

    monkeypatch.setattr(store, "images_by_key", asked_as_another_registers)

    result = register(store, find_images(str(tmp_path / "a")))

    assert result.num_new == 1
    assert len({image.key for image in store.images()}) == 2


def test_an_image_that_is_to_be_labelled_is_not_held_out_later(
    store: Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register(store, find_images(str(folder / "o*.png")))

    register(store, find_images(str(folder / "o*.png")), held_out=1.0)

    assert store.num_images(held_out=True) == 0
    assert "one.png is not held out: it was registered to be labelled" in caplog.text


def test_images_in_object_storage_are_registered_and_read_where_they_lie(store: Store) -> None:
    bucket = fsspec.filesystem("memory")
    for number in range(2):
        bucket.pipe_file(f"/scans/{store.engine.name}/{number}.png", picture(number))
    bucket.pipe_file(f"/scans/{store.engine.name}/notes.txt", b"no image")

    result = register(store, find_images(f"memory://scans/{store.engine.name}"))

    assert result.num_new == 2
    by_key = {image.key: image for image in store.images()}
    assert image_bytes(by_key["1"]) == picture(1)
    bucket.rm_file(f"/scans/{store.engine.name}/1.png")
    with pytest.raises(ImageGoneError, match="put it back"):
        image_bytes(by_key["1"])


def test_an_image_in_a_shard_of_object_storage_is_found_again(store: Store, tmp_path: Path) -> None:
    files = {f"{number}.png": picture(number) for number in range(3)}
    shard = write_shard(tmp_path / "a.tar", files)
    place = f"/shards/{store.engine.name}/a.tar"
    fsspec.filesystem("memory").pipe_file(place, shard.read_bytes())

    register(store, find_images(f"memory:/{place}"))

    by_key = {image.key: image for image in store.images()}
    assert [image_bytes(by_key[str(number)]) for number in range(3)] == list(files.values())
