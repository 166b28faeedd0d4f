"""Lists of files that take little memory and are shared by the processes that a reader forks."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """A sequence of texts as one block of bytes: a million Python strings would be copied by every reader."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Names: ...

    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return Names(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} names, got index {index}")
        start, end = self._ends[index % len(self)], self._ends[index % len(self) + 1]
        return os.fsdecode(self._bytes[start:end])


def make_texts(items: object, *fields: str) -> None:
    """Makes a frozen record's paths texts: a folder called 2017 comes from YAML as a number."""
    for name in fields:
        object.__setattr__(items, name, str(getattr(items, name)))


def files_below(path: str, suffixes: Collection[str]) -> tuple[str, list[str]]:
    """The files with these suffixes below a folder, at any depth, or below what a glob matches.

    Names that begin with a dot are passed over.

    Returns:
        The folder that all lie in, and their paths from there, sorted.

    Raises:
        FileNotFoundError: there is no such folder, or nothing that the glob matches.
    """
    if os.path.isdir(path):
        root, tops = path, [path]
    else:
        tops = sorted(glob.glob(path, recursive=True))
        root = _root_of_glob(path)
        if not glob.has_magic(path) or not tops:
            raise FileNotFoundError(f"{path}: there is no such folder")
    found = {
        os.path.relpath(file, root)
        for top in tops
        for file in _walk(top)
        if os.path.splitext(file)[1].lower() in suffixes
    }
    return root, sorted(found)


def _walk(top: str) -> Iterator[str]:
    if os.path.isfile(top):
        yield top
    for folder, subfolders, files in os.walk(top, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in files if not name.startswith("."))


def _root_of_glob(pattern: str) -> str:
    parts = Path(pattern).parts
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return str(Path(*parts[:plain])) if plain else "."
