"""Tar files whose bytes depend on nothing but what is put into them."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import tarfile
from collections.abc import Mapping
from pathlib import Path


class TarWriter:
    """Writes samples to a tar and sums up its bytes; the file appears under its name when it is whole.

    Attributes:
        num_bytes: of the samples so far, without the tar's own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        # A process's number is not enough: in containers many machines count from 1.
        self._unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
        self._file = _Summed(self._unfinished)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        """Adds a sample's files, by suffix."""
        for suffix, data in files.items():
            entry = tarfile.TarInfo(f"{key}.{suffix}")
            entry.size, entry.mode = len(data), 0o644
            self._tar.addfile(entry, io.BytesIO(data))
            self.num_bytes += len(data)

    def finish(self) -> tuple[int, str]:
        """Puts the file in place; returns its size in bytes and its SHA-256."""
        self._tar.close()
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._unfinished.replace(self.path)
        return size, self._file.sum.hexdigest()

    def abandon(self) -> None:
        """Leaves nothing behind; for what was not finished, or failed to be."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)


class _Summed(io.FileIO):
    """A new file that sums up what is written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.sum = hashlib.sha256()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.sum.update(data)
        written = 0
        while written < len(data):
            try:
                written += super().write(data[written:]) or 0
            except OSError as error:
                self.close()
                said = f"{error.strerror}. Finished shards are kept: mend that and start again"
                raise OSError(error.errno, said, str(self.name)) from None
        return written
