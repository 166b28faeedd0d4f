import errno
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from sam_train.ops.files import write_atomically


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    write_atomically(path, "old")

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    monkeypatch.undo()

    def breaks_off(unfinished: Path) -> None:
        unfinished.write_text("ne")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_atomically(path, breaks_off)

    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_a_full_disk_is_named_as_one_whatever_a_library_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_a_library(_: Path) -> None:
        raise RuntimeError("unexpected pos 569088 vs 568976")

    def of_the_system(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.ckpt"
    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_atomically(path, of_a_library)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_atomically(path, of_the_system)

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_atomically(path, of_a_library)
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "new folder" / "written"
    plain.touch()

    write_atomically(written, lambda path: path.write_bytes(b"tensors"))

    assert written.read_bytes() == b"tensors"
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_project_has_one_way_to_write() -> None:
    package = Path(__file__).parents[3] / "sam_train"
    defining = [
        path.relative_to(package)
        for path in package.rglob("*.py")
        if "def write_atomically" in path.read_text(encoding="utf-8")
    ]
    assert defining == [Path("ops/files.py")]
