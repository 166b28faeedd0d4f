"""Copies of a store: a SQLite file, which is a store itself, and back into an empty database."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine, insert, select

from data_engine.mask_store.connect import StoreError, explained, where
from data_engine.mask_store.rows import CHUNK, chunks
from data_engine.mask_store.schema import metadata
from data_engine.mask_store.store import Store, open_store
from sam_train.ops.files import write_atomically


def back_up(store: Store, path: str | Path) -> None:
    """Writes all of a store, as it stands at one moment, to a new SQLite file; work may go on meanwhile.

    Raises:
        StoreError: there is such a file, or it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise StoreError(f"{path} is there already; a backup does not replace anything")
    copy = _copy_file if store.engine.name == "sqlite" else _copy_to_file
    try:
        write_atomically(path, lambda unfinished: copy(store, unfinished))
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error


def copy_rows(source: Engine, target: Engine) -> None:
    """Copies all rows into the tables of another database, which must be empty, in one transaction.

    Raises:
        StoreError: it is not empty.
    """
    if source.name == "postgresql":  # all tables as they were at one moment
        source = source.execution_options(isolation_level="REPEATABLE READ")
    with (
        explained(source),
        source.begin() as reader,
        explained(target),
        target.execution_options(write=True).begin() as writer,
    ):
        for table in metadata.sorted_tables:
            if writer.execute(select(table).limit(1)).first() is not None:
                raise StoreError(f"{where(target)} is not empty: it has {table.name}")
        for table in metadata.sorted_tables:
            rows = reader.execution_options(yield_per=CHUNK).execute(select(table))
            for chunk in chunks(rows, CHUNK):
                writer.execute(insert(table), [dict(row._mapping) for row in chunk])


def _copy_file(store: Store, unfinished: Path) -> None:
    with (
        store.read() as connection,
        closing(sqlite3.connect(unfinished)) as target,
    ):
        source = connection.connection.driver_connection
        assert isinstance(source, sqlite3.Connection)
        source.backup(target)
        # In one file, with nothing beside it that a copy of it could forget.
        target.execute("PRAGMA journal_mode = DELETE")


def _copy_to_file(store: Store, unfinished: Path) -> None:
    copy = open_store(unfinished, create=True)
    try:
        copy_rows(store.engine, copy.engine)
    finally:
        copy.close()
    with closing(sqlite3.connect(unfinished)) as target:
        target.execute("PRAGMA journal_mode = DELETE")
    for suffix in ("-wal", "-shm"):
        assert not os.path.exists(f"{unfinished}{suffix}")
