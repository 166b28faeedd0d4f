"""Opens a database, a SQLite file or a PostgreSQL server, and says in a sentence why it cannot."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

POSTGRESQL = frozenset({"postgresql", "postgres", "postgresql+psycopg"})
CONNECT_TIMEOUT_S = 10

REASONS = (
    ("database is locked", "is locked: another process writes to it; try again when that is done"),
    ("lock timeout", "is locked: another process writes to it; try again when that is done"),
    ("not a database", "is no SQLite file, so no store: say another path, or put a backup there"),
    ("malformed", "is damaged: put a backup of it there"),
    ("disk is full", "cannot grow, the disk is full: make room and go on; nothing is half-written"),
    (
        "no space left",
        "cannot grow, its disk is full: make room and go on; nothing is half-written",
    ),
    ("readonly database", "cannot be written to: look at the rights of its file and folder"),
    ("unable to open", "cannot be opened: look at the rights of its file and folder"),
    ("disk i/o error", "cannot be read or written: its disk is full or reports an error"),
)


class StoreError(OSError):
    """The store cannot be opened, read or written; the message says why and what to do."""


def make_engine(url: str | Path, *, create: bool = False, busy_timeout_s: float = 30.0) -> Engine:
    """Makes what connections to the database come from; see `open_store` for the arguments.

    Raises:
        StoreError: it is of an unknown kind, or a file that is not there.
    """
    text = str(url)
    try:
        parsed = make_url(text) if "://" in text else None
    except ArgumentError:
        raise StoreError(f"store.url={text} is neither a URL nor a path") from None
    if parsed is None or (parsed.drivername == "sqlite" and parsed.database):
        path = Path(text if parsed is None else str(parsed.database))
        engine = _sqlite(path.absolute(), create, busy_timeout_s)
    elif parsed.drivername in POSTGRESQL:
        engine = _postgresql(text, busy_timeout_s)
    else:
        raise StoreError(
            "store.url is the path of a SQLite file or postgresql://USER@HOST/DATABASE, got "
            f"{parsed.render_as_string(hide_password=True)}"
        )
    _forget_in_children(engine)
    return engine


def where(engine: Engine) -> str:
    """The database's name for messages, without a password."""
    if engine.name == "sqlite":
        return str(engine.url.database)
    return engine.url.render_as_string(hide_password=True)


@contextmanager
def explained(engine: Engine) -> Iterator[None]:
    """Turns what the database complains of into a `StoreError`; broken constraints pass through."""
    try:
        yield
    except IntegrityError:
        raise
    except PoolTimeout:
        raise StoreError(f"{where(engine)}: no connection got free in time") from None
    except DBAPIError as error:
        raise StoreError(f"{where(engine)} {_reason(str(error.orig))}") from error
    except SQLAlchemyError as error:
        raise StoreError(f"{where(engine)}: {error}") from error


def _reason(complaint: str) -> str:
    for sign, reason in REASONS:
        if sign in complaint.lower():
            return reason
    first = " ".join(complaint.strip().split("\n")[0].split())
    return f"does not answer as it should: {first}"


def _sqlite(path: Path, create: bool, busy_timeout_s: float) -> Engine:
    try:
        if path.is_dir():
            raise StoreError(f"{path} is a folder, expected the file of a store")
        if not path.exists() and not create:
            raise StoreError(f"{path}: there is no store; make one with `data-engine init`")
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_or_check(path)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: {error.strerror}") from None
    # SQLite would go on writing to a file that was removed or put aside, and nobody would see it.
    identity = _identity(path)

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw",
            uri=True,
            timeout=busy_timeout_s,
            check_same_thread=False,  # the pool hands a connection to one thread at a time
            isolation_level=None,  # transactions begin where `begin` says
        )
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        # What a person has handed in is on the disk before they are thanked, power cut or not.
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    log_path = Path(f"{path}-wal")

    url = URL.create("sqlite", database=str(path))
    engine = create_engine(url, creator=connect, max_overflow=-1, json_serializer=_plain_json)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if _identity(path) != identity:
            raise StoreError(
                f"{path} is gone: it was removed or replaced while it was in use; put it or a backup "
                "back and start again"
            )
        is_write = connection.get_execution_options().get("write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")
        connection.exec_driver_sql("SELECT 1 FROM sqlite_master")  # opens the log, if it was not
        # SQLite likewise goes on writing to a log that was removed, and all of it is lost with the process.
        found = _identity(log_path)
        if connection.info.setdefault("log", found) not in (None, found):
            raise StoreError(
                f"{log_path} is gone or was replaced while it was in use (a file system whose locks do not "
                "hold, or somebody deleted it): nothing more is written; start again"
            )

    return engine


def _make_or_check(path: Path) -> None:
    """Makes an empty file where there is none, or sees whether it may be written.

    A file that is there is not opened: closing it again would let go of all locks that this process's
    other connections hold on it (POSIX), and another process might then remove the log they write to.
    """
    try:
        path.open("xb").close()
    except FileExistsError:
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def _plain_json(value: Any) -> str:
    """JSON that PostgreSQL takes too: no NaN."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _postgresql(text: str, busy_timeout_s: float) -> Engine:
    url = make_url(text).set(drivername="postgresql+psycopg")
    try:
        return create_engine(
            url,
            json_serializer=_plain_json,
            pool_pre_ping=True,  # a server may have been started anew
            max_overflow=-1,
            connect_args={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "options": f"-c lock_timeout={int(busy_timeout_s * 1000)}",
            },
        )
    except ImportError:
        raise StoreError("PostgreSQL needs psycopg: pip install 'sam-train[engine]'") from None


def _forget_in_children(engine: Engine) -> None:
    """Two processes must not talk through one connection, as after a fork."""
    reference = weakref.ref(engine)

    def forget() -> None:
        if (mine := reference()) is not None:
            mine.dispose(close=False)

    os.register_at_fork(after_in_child=forget)
