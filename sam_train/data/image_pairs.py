"""Folders of SA-1B as it is unpacked: NAME.jpg beside NAME.json."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sam_train.data.file_lists import Names, files_below
from sam_train.data.indexed import IndexedSource
from sam_train.data.sa1b import ShardSource
from sam_train.data.shards import IMAGE_SUFFIXES, decode_record
from sam_train.structures import ImageRecord


@dataclass(frozen=True, kw_only=True)
class PairItems:
    """Images beside their JSON, at any depth below folders, as `Items`.

    Attributes:
        path: a folder, or a glob of folders.
    """

    path: str

    @cached_property
    def names(self) -> Names:
        """The paths of images and of JSON, each name once, without suffix."""
        root, files = files_below(
            self.path, {".json", *(f".{suffix}" for suffix in IMAGE_SUFFIXES)}
        )
        return Names(sorted({os.path.join(root, os.path.splitext(name)[0]) for name in files}))

    @cached_property
    def root(self) -> str:
        """The folder that keys begin below."""
        return os.path.commonpath([os.path.dirname(self.names[0]), os.path.dirname(self.names[-1])])

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, index: int) -> str:
        """See `Items`."""
        return Path(os.path.relpath(self.names[index], self.root)).as_posix()

    def record(self, index: int) -> ImageRecord:
        """See `Items`."""
        return decode_record(self.describe(index), self.files(index))

    def files(self, index: int) -> dict[str, bytes]:
        """An image's files by suffix."""
        stem = self.names[index]
        return {
            suffix: Path(path).read_bytes()
            for suffix in ("json", *IMAGE_SUFFIXES)
            for path in (f"{stem}.{suffix}", f"{stem}.{suffix.upper()}")
            if os.path.isfile(path)
        }


def sa1b_source(*, path: str | int | Sequence[str], **settings: Any) -> ShardSource | IndexedSource:
    """SA-1B data as tars or as an unpacked folder, told apart by what lies at the path.

    Args:
        path: what `ShardSource` takes, or a folder of images beside their JSON, or a glob of such.
        settings: what `ShardSource` takes; an unpacked folder needs none of its own two.
    """
    if isinstance(path, int):  # a folder called 2017, by way of YAML
        path = str(path)
    if isinstance(path, str) and _is_unpacked(path):
        own = {"shuffle_buffer_mb", "allow_pipe"}
        rest = {name: value for name, value in settings.items() if name not in own}
        return IndexedSource(items=PairItems(path=path), **rest)
    return ShardSource(path=path, **settings)


def _is_unpacked(path: str) -> bool:
    tops = [path] if os.path.isdir(path) else glob.glob(path) if glob.has_magic(path) else []
    folders = [top for top in tops if os.path.isdir(top)]
    if not folders or any(next(Path(folder).glob("*.tar"), None) for folder in folders):
        return False
    return any(next(Path(folder).rglob("*.json"), None) for folder in folders)
