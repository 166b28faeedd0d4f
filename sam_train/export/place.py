"""Where an export goes: nothing is overwritten unasked, and nothing half written is ever there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def check_free(out: Path, *, is_folder: bool, overwrite: bool) -> None:
    """Sees that something may be written at `out`.

    Raises:
        FileExistsError: it is there already, and is no empty folder.
        NotADirectoryError, IsADirectoryError: it is there, and of the other kind.
    """
    if not out.exists():
        return
    if is_folder and not out.is_dir():
        raise NotADirectoryError(
            f"{out} is a file; this format is a folder: choose another out=PATH"
        )
    if not is_folder and out.is_dir():
        raise IsADirectoryError(
            f"{out} is a folder; this format is a file: say out={out / 'sam.pth'}"
        )
    if not overwrite and not (is_folder and not any(out.iterdir())):
        raise FileExistsError(
            f"{out} is there already: choose another out=PATH, or say overwrite=true"
        )


def write_whole(
    out: Path, write: Callable[[Path], Result], *, owned: Collection[str] = ()
) -> Result:
    """Has a file or folder written beside `out` and puts it in place once it is whole.

    Of a folder that is there already, the files of the same names are replaced, in the order in which
    they were written; others stay.

    Args:
        out: the final place.
        write: writes to the path it is given.
        owned: names that belong to the format: left from an earlier export, they would be taken for a part
            of this one, and go.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        made = Path(folder) / out.name
        result = write(made)
        files = sorted(made.iterdir(), key=_written_at) if made.is_dir() else [made]
        for file in files:
            with file.open("rb+") as stream:
                # A machine that fails may else keep the name and not the content.
                os.fsync(stream.fileno())
        if made.is_dir() and out.is_dir():
            for file in files:
                file.replace(out / file.name)
            for name in set(owned) - {file.name for file in files}:
                (out / name).unlink(missing_ok=True)
        else:
            made.replace(out)
    return result


def _written_at(path: Path) -> int:
    return path.stat().st_mtime_ns
