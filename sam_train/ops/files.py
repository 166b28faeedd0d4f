"""Files that are either the old ones or the new ones, whenever a process ends."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

FULL_BYTES = 2**20
"""A disk with less to spare is the reason why a library could not write, whatever it says itself."""


class DamagedFileError(ValueError):
    """A file that is not what was once written; the message says how it is known."""


def check_whole(path: Path) -> None:
    """Reads a zip file, such as `torch.save` writes, and compares all of it with its checksums.

    Raises:
        DamagedFileError: it is damaged, cut short or no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise DamagedFileError(f"{path} is damaged, cut short or no checkpoint: {error}") from error
    if bad is not None:
        raise DamagedFileError(f"{path} is damaged: the checksum of {bad} is wrong")


def make_writable_folder(path: Path) -> None:
    """Makes a folder; that nothing can be written to it is better known before long work than after it.

    Raises:
        OSError: it cannot be made, or written to.
    """
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


def write_atomically(
    path: Path,
    content: str | Callable[[Path], object],
    *,
    before: Callable[[], object] | None = None,
) -> None:
    """Fills a file beside `path`, then puts it in place: a reader sees all of it or what was there.

    Args:
        path: the final place; its folder is made.
        content: text, or what writes to the path it is given.
        before: called when the new file is whole and on disk, and the old one still there.

    Raises:
        OSError: the folder or the file cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        if isinstance(content, str):
            unfinished.write_text(content, encoding="utf-8")
        else:
            content(unfinished)
        # mkstemp makes files for the owner's eyes alone.
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o666 & ~umask)
        with unfinished.open("rb+") as file:
            # A machine that fails may else keep the name and not the content.
            os.fsync(file.fileno())
        if before is not None:
            before()
        unfinished.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:  # each library's own
        if shutil.disk_usage(path.parent).free < FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)
