"""Records to rows and back: fields and columns have the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, Table
from sqlalchemy.dialects import postgresql, sqlite

Record = TypeVar("Record")
CHUNK = 500


def to_row(record: Any) -> dict[str, Any]:
    """A record's fields; nested values stay as they are."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def from_row(kind: type[Record], row: Row[Any]) -> Record:
    """A record of all columns of its table."""
    return kind(**row._mapping)


def insert_new(connection: Connection, table: Table, rows: Iterable[Mapping[str, Any]]) -> int:
    """Inserts rows but those whose primary key is there; returns how many it inserted."""
    key = table.primary_key
    # What comes back is counted: of many rows at once psycopg does not tell how many it inserted.
    insert = _insert(connection, table).on_conflict_do_nothing(index_elements=key).returning(*key)
    return sum(len(connection.execute(insert, chunk).all()) for chunk in chunks(rows, CHUNK))


def put(connection: Connection, table: Table, row: Mapping[str, Any], where: Any = None) -> bool:
    """Inserts a row or overwrites the one of its primary key; returns whether it did.

    Args:
        where: what must hold of a row to be overwritten.
    """
    insert = _insert(connection, table).values(**row)
    changes = {name: insert.excluded[name] for name in row if name not in table.primary_key.columns}
    key = table.primary_key
    update = insert.on_conflict_do_update(index_elements=key, set_=changes, where=where)
    return connection.execute(update.returning(*key)).first() is not None


def _insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    kind = sqlite if connection.dialect.name == "sqlite" else postgresql
    return kind.insert(table)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items and one of the rest."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
