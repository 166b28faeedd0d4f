"""Opens what lies elsewhere: as webdataset does where it knows the kind of URL, else through fsspec (s3, az, gcs ...)."""

from __future__ import annotations

import glob
from typing import IO, cast
from urllib.parse import urlparse

from webdataset.gopen import gopen, gopen_schemes, rewrite_url


def is_of_fsspec(url: str) -> bool:
    """Whether fsspec opens it: such a file can be read from any byte on, and its folder be listed."""
    scheme = urlparse(rewrite_url(url)).scheme
    return scheme not in ("", "file", *gopen_schemes)


def open_url(url: str) -> IO[bytes]:
    """Opens a URL to be read.

    Raises:
        OSError: there is no such file.
        ImportError: fsspec needs a package for this kind; the message names it.
        ValueError: nobody knows this kind.
    """
    if not is_of_fsspec(url):
        return cast("IO[bytes]", gopen(url))
    import fsspec

    return cast("IO[bytes]", fsspec.open(rewrite_url(url), "rb").open())


def listed(url: str) -> list[str]:
    """The files below a folder of fsspec's, or what a glob matches there, sorted; a file alone is itself."""
    import fsspec

    files, path = fsspec.core.url_to_fs(rewrite_url(url))
    if glob.has_magic(path):
        found = files.glob(path)
    elif files.isdir(path):
        found = files.find(path)
    else:
        return [url]
    return sorted(map(files.unstrip_protocol, found))
