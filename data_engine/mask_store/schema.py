"""The tables: a column a field of the record, by the same name.

A change here needs a numbered migration beside it (`migrations/versions`); a test compares the two.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
    desc,
)

from data_engine.records import Event

WALL_CLOCK = frozenset({"created_at", "finished_at", "received_at", "lease_expires_at"})
"""Columns that differ between two runs that did the same."""


TEXT = String().with_variant(String(collation="C"), "postgresql")
"""Ordered by bytes, as SQLite does, whatever the server's language is."""


class Tuples(TypeDecorator[tuple[Any, ...] | None]):
    """A JSON list that comes back as a tuple, as do the lists in it."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[Any, ...] | None:
        return None if value is None else _tuples(value)


class Events(TypeDecorator[tuple[Event, ...]]):
    """What an annotator did, as JSON."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> list[dict[str, Any]]:
        return [vars(event) for event in value]

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[Event, ...]:
        return tuple(Event(**fields) for fields in value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _json() -> JSON:
    return JSON(none_as_null=True)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

images = Table(
    "images",
    metadata,
    Column("id", TEXT, primary_key=True),
    Column("key", TEXT, nullable=False, unique=True),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("path", TEXT, nullable=False),
    Column("member", TEXT),
    Column("offset", BigInteger),
    Column("held_out", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
    Index(None, "path", "member"),
)

rounds = Table(
    "rounds",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("stage", TEXT, nullable=False),
    Column("state", TEXT, nullable=False),
    Column("plan_step", Integer, nullable=False),
    Column("model_id", TEXT),
    Column("config", _json(), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
)

models = Table(
    "models",
    metadata,
    Column("id", TEXT, primary_key=True),
    Column("path", TEXT, nullable=False),
    Column("parent", TEXT),
    Column("round", Integer),
    Column("trained_on", Tuples, nullable=False),
    Column("data_fingerprint", TEXT, nullable=False),
    Column("config", _json(), nullable=False),
    Column("code_version", TEXT, nullable=False),
    Column("metrics", _json(), nullable=False),
    Column("promoted", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", TEXT, primary_key=True),
    Column("round", Integer, nullable=False, index=True),
    Column("stage", TEXT, nullable=False),
    Column("image_id", TEXT, ForeignKey("images.id"), nullable=False, index=True),
    Column("state", TEXT, nullable=False),
    Column("priority", Double, nullable=False),
    Column("reserved_for", TEXT),
    Column("annotator", TEXT),
    Column("lease_expires_at", Double),
    Column("version", Integer, nullable=False),
    Column("payload", _json(), nullable=False),
    Column("created_at", Double, nullable=False),
)
# The next open task is the first of its state in this index.
Index("ix_tasks_queue", tasks.c.state, desc(tasks.c.priority), tasks.c.id)

submissions = Table(
    "submissions",
    metadata,
    Column("submission_id", TEXT, primary_key=True),
    # Whatever the code above does, no task is done twice.
    Column("task_id", TEXT, ForeignKey("tasks.id"), nullable=False, unique=True),
    Column("version", Integer, nullable=False),
    Column("annotator", TEXT, nullable=False),
    Column("digest", TEXT, nullable=False),
    Column("mask_ids", Tuples, nullable=False),
    Column("events", Events, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("received_at", Double, nullable=False),
)

masks = Table(
    "masks",
    metadata,
    Column("id", TEXT, primary_key=True),
    Column("image_id", TEXT, ForeignKey("images.id"), nullable=False, index=True),
    Column("task_id", TEXT, ForeignKey("tasks.id"), nullable=False, index=True),
    Column("round", Integer, nullable=False, index=True),
    Column("source", TEXT, nullable=False),
    Column("rle", _json(), nullable=False),
    Column("bbox", Tuples, nullable=False),
    Column("area", BigInteger, nullable=False),
    Column("author", TEXT, nullable=False),
    Column("model_id", TEXT),
    Column("label", TEXT),
    Column("point_coords", Tuples),
    Column("predicted_iou", Double),
    Column("stability_score", Double),
    Column("seconds", Double, nullable=False),
    Column("num_clicks", Integer, nullable=False),
    Column("corrects", TEXT),
    Column("created_at", Double, nullable=False),
)

reviews = Table(
    "reviews",
    metadata,
    Column("id", TEXT, primary_key=True),
    Column("round", Integer, nullable=False, index=True),
    Column("image_id", TEXT, ForeignKey("images.id"), nullable=False, index=True),
    Column("annotator", TEXT, nullable=False),
    Column("before_id", TEXT, nullable=False),
    Column("before", _json(), nullable=False),
    Column("after", _json()),
    Column("iou", Double, nullable=False),
    Column("task_id", TEXT),
    Column("seconds", Double, nullable=False),
    Column("created_at", Double, nullable=False),
)

shards = Table(
    "shards",
    metadata,
    Column("path", TEXT, primary_key=True),
    Column("round", Integer, nullable=False, index=True),
    Column("source", TEXT, nullable=False),
    Column("num_images", Integer, nullable=False),
    Column("num_masks", Integer, nullable=False),
    Column("sha256", TEXT, nullable=False),
    Column("model_id", TEXT),
    Column("created_at", Double, nullable=False),
)

shard_images = Table(
    "shard_images",
    metadata,
    Column("shard_path", TEXT, ForeignKey("shards.path", ondelete="CASCADE"), primary_key=True),
    Column("image_id", TEXT, primary_key=True, index=True),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("image_id", TEXT, primary_key=True),
    Column("key", TEXT, nullable=False),
    Column("reason", TEXT, nullable=False),
    Column("who", TEXT, nullable=False),
    Column("shards", Tuples, nullable=False),
    Column("models", Tuples, nullable=False),
    Column("created_at", Double, nullable=False),
)

claims = Table(
    "claims",
    metadata,
    Column("name", TEXT, primary_key=True),
    Column("holder", TEXT, nullable=False),
    Column("lease_expires_at", Double, nullable=False),
)
