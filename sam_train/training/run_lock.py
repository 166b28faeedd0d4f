"""One run at a time in a folder: a lock that goes with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = Path(".lock")
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables that launchers number processes by, or machines; the first of a run has 0 in each."""
IN_USE = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
ATTEMPTS = 100


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a run folder, which is made if need be, until the block or the process ends.

    Of a run's processes the first holds it for all. Where the file system knows no locks that is said in
    the log, and nothing is held. A folder made here that nothing was put into goes again.

    Raises:
        ValueError: another run holds it.
    """
    if any(os.environ.get(name, "0") not in ("", "0") for name in RANKS):
        yield
        return
    is_new = not folder.exists()
    handle = _acquire(folder)
    try:
        yield
    finally:
        if handle is not None:
            (folder / LOCK).unlink(missing_ok=True)  # while it is still held
            os.close(handle)
            if is_new:
                with contextlib.suppress(OSError):  # it holds something by now
                    folder.rmdir()


def _acquire(folder: Path) -> int | None:
    """The locked file; None where there can be none."""
    path = folder / LOCK
    for _ in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the run before has just removed the folder that it made
            continue
        except OSError:  # a folder that cannot be written holds no run, and `prepare` says so
            return None
        try:
            # By process, so that a reader forked from it does not hold on to it when the process is killed,
            # as it would with `flock`.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 1000, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in IN_USE:
                raise ValueError(
                    f"{folder} is in use by {holder or 'a run that is just starting'}: wait for its end, "
                    "stop it, or choose another run_dir=PATH"
                ) from None
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "%s lies on a file system without locks (%s): see that no other run is started in it",
                folder,
                error.strerror,
            )
            path.unlink(missing_ok=True)
            return None
        if _is_at(path, handle):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle
        os.close(handle)  # the run before has removed it between the opening and the locking
    return None


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
