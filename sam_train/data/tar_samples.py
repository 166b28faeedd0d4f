"""Samples of a tar file as they lie: files grouped by key, each with the place where the next begins.

webdataset's own reader tells no places and takes a header that it cannot read, or one of zeros, for the
end of the file. Of local files that are not compressed, what follows such an end is looked at too.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlparse

from sam_train.data.urls import is_of_fsspec, open_url

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How files of gzip, bzip2, xz and zstandard begin: these can only be read from their start."""

MAX_END = 2**20
"""Bytes of zeros that may end a tar; tar itself writes 1 to 10 KiB, more only if told to."""


class TarSample(NamedTuple):
    """The files of one key, adjacent in a tar.

    Attributes:
        key: their common name, up to the first dot after the last slash.
        files: their contents by suffix, in lower case.
        end: byte at which the next sample begins; the first begins at 0.
    """

    key: str
    files: dict[str, bytes]
    end: int

    @property
    def num_bytes(self) -> int:
        """The size of its files."""
        return sum(map(len, self.files.values()))


class BrokenTarError(OSError):
    """A tar that breaks off or holds what is no tar header; the message says where."""


def read_samples(url: str, is_wanted: Callable[[str], bool], start: int = 0) -> Iterator[TarSample]:
    """Reads the samples of a shard from byte `start` on; one that is local or fsspec's is not read before it.

    A key that comes again with a suffix that it had begins another sample. Files whose names begin with
    a dot are passed over.

    Args:
        url: a path, or what webdataset takes.
        is_wanted: says by its name, in lower case, whether a file belongs to a sample at all.
        start: a sample's `end`, or 0.

    Raises:
        BrokenTarError: after the samples before the break were given out.
        OSError: it cannot be opened.
    """
    key, files = "", dict[str, bytes]()
    end = start
    broken = None
    try:
        for place, name, data, end in _files(url, is_wanted, start):  # noqa: B007  the last counts
            its_key, suffix = _split(name)
            if files and (its_key != key or suffix in files):
                yield TarSample(key, files, place)
                files = {}
            key = its_key
            files[suffix] = data
    except BrokenTarError as error:
        broken = error
    if files:
        yield TarSample(key, files, end)
    if broken is not None:
        raise broken


def _files(
    url: str, is_wanted: Callable[[str], bool], start: int
) -> Iterator[tuple[int, str, bytes, int]]:
    """The wanted files: place of the header, name, content, end."""
    with _open(url) as stream:
        can_seek = local_path(url) is not None or is_of_fsspec(url)
        seeks = can_seek and not stream.read(6).startswith(COMPRESSED)
        if can_seek:
            stream.seek(start if seeks else 0)
        tar: Any = None
        try:
            tar = tarfile.open(  # noqa: SIM115  it holds nothing but the stream
                fileobj=stream, mode="r:" if seeks else "r|*", tarinfo=_StrictTarInfo
            )
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile would keep all it has met
                if member.offset < start or not member.isfile() or _is_hidden(member.name):
                    continue
                if is_wanted(member.name.lower()):
                    data = _content(tar, member, stream if seeks else None)
                    yield member.offset, member.name, data, tar.offset
            if seeks:
                _check_end(stream, tar.offset)
        except (tarfile.TarError, EOFError) as error:
            where = f"it breaks off at byte {tar.offset}" if tar else "it is no tar file"
            raise BrokenTarError(f"{where}: {error}") from None


def _content(tar: Any, member: Any, stream: IO[bytes] | None) -> bytes:
    """A member's bytes; directly from a stream that can be read anywhere, which is quicker."""
    if stream is None or member.issparse():
        return tar.extractfile(member).read()
    stream.seek(member.offset_data)
    data = stream.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _check_end(stream: IO[bytes], start: int) -> None:
    """Raises where what follows a tar's last file is no end: a header of zeros may be a hole in the file."""
    stream.seek(start)
    place = start
    while block := stream.read(MAX_END):
        if len(behind := block.lstrip(b"\0")):
            raise BrokenTarError(
                f"it breaks off at byte {start}: expected a file or the end, got zeros, "
                f"and data again from byte {place + len(block) - len(behind)} on"
            )
        place += len(block)
    if place - start > MAX_END:
        raise BrokenTarError(
            f"it breaks off at byte {start}: it ends in {place - start} bytes of zeros: "
            "an unfinished download?"
        )


def local_path(url: str) -> str | None:
    """The path of a shard that is a file of this machine, stated by path or as a file: URL."""
    parts = urlparse(url)
    if parts.scheme == "file":
        return unquote(parts.path)
    return url if parts.scheme == "" and url != "-" else None


def _open(url: str) -> IO[bytes]:
    path = local_path(url)
    return open_url(url) if path is None else open(path, "rb")


def _is_hidden(name: str) -> bool:
    """Whether it begins with a dot, as what macOS puts between the files of a sample: `._a.jpg`."""
    return os.path.basename(name).startswith(".")


def _split(name: str) -> tuple[str, str]:
    folder, base = os.path.split(name.removeprefix("./"))
    stem, _, suffix = base.partition(".")
    return os.path.join(folder, stem), suffix.lower()


class _StrictTarInfo(tarfile.TarInfo):
    """Raises where tarfile ends a file quietly: at a header that is damaged, cut short or missing."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except (
            tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
            tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
            tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
        ) as error:
            raise tarfile.ReadError(str(error)) from None
