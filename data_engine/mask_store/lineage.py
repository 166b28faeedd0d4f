"""What came from one image, and taking it down when a person asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Column, Connection, delete, select

from data_engine.mask_store import schema
from data_engine.mask_store.rows import from_row, put, to_row
from data_engine.mask_store.store import Store
from data_engine.records import Image, Lineage, Tombstone


def everything_from(store: Store, image_id: str) -> Lineage:
    """Names all that came from an image; empty for one that is not known."""
    with store.read() as connection:
        return _lineage(connection, image_id)


def take_down(store: Store, image_id: str, *, reason: str, who: str, now: float) -> Tombstone:
    """Removes an image's row, tasks, submissions, masks and reviews, in one transaction.

    Its file and the engine's shards and models are not touched. What is kept is its hash, so that it is
    not registered again, and what is left to clean. Taking it down again gives the same tombstone.

    Raises:
        KeyError: it is not known.
    """
    with store.write() as connection:
        if (known := _tombstone(connection, image_id)) is not None:
            return known
        row = connection.execute(
            select(schema.images).where(schema.images.c.id == image_id)
        ).one_or_none()
        if row is None:
            raise KeyError(f"no image {image_id} is registered in {store.name}")
        found = _lineage(connection, image_id)
        tombstone = Tombstone(
            image_id=image_id,
            key=from_row(Image, row).key,
            reason=reason,
            who=who,
            shards=found.shards,
            models=found.models,
            created_at=now,
        )
        put(connection, schema.tombstones, to_row(tombstone))
        _remove(connection, image_id)
    return tombstone


def cleaned(store: Store, image_id: str, names: Iterable[str]) -> Tombstone:
    """Notes that shards or models, by path or id, hold nothing of a taken-down image any more.

    Raises:
        KeyError: no such image was taken down.
    """
    gone = frozenset(names)
    with store.write() as connection:
        known = _tombstone(connection, image_id)
        if known is None:
            raise KeyError(f"no image {image_id} was taken down from {store.name}")
        left = {
            kind: tuple(name for name in getattr(known, kind) if name not in gone)
            for kind in ("shards", "models")
        }
        row = to_row(known) | left
        put(connection, schema.tombstones, row)
    return Tombstone(**row)


def tombstones(store: Store) -> list[Tombstone]:
    """The images that were taken down, by id."""
    query = select(schema.tombstones).order_by("image_id")
    with store.read() as connection:
        return [from_row(Tombstone, row) for row in connection.execute(query)]


def _tombstone(connection: Connection, image_id: str) -> Tombstone | None:
    table = schema.tombstones
    query = select(table).where(table.c.image_id == image_id).with_for_update()
    row = connection.execute(query).one_or_none()
    return None if row is None else from_row(Tombstone, row)


def _lineage(connection: Connection, image_id: str) -> Lineage:
    tasks, masks, reviews, shards = (
        schema.tasks.c,
        schema.masks.c,
        schema.reviews.c,
        schema.shards.c,
    )
    paths = _values(connection, schema.shard_images.c.shard_path, image_id)
    rounds: set[int] = set()
    for table in (tasks, masks, reviews):
        rounds.update(_values(connection, table.round, image_id))
    rounds.update(connection.scalars(select(shards.round).where(shards.path.in_(paths))))
    return Lineage(
        image_id=image_id,
        tasks=tuple(_values(connection, tasks.id, image_id)),
        masks=tuple(_values(connection, masks.id, image_id)),
        reviews=tuple(_values(connection, reviews.id, image_id)),
        rounds=tuple(sorted(rounds)),
        models=_models(connection, paths),
        shards=tuple(paths),
    )


def _values(connection: Connection, column: Column, image_id: str) -> list:
    """A column's values in the rows of an image."""
    of_image = column.table.c.image_id == image_id
    return list(connection.scalars(select(column).where(of_image).distinct().order_by(column)))


def _models(connection: Connection, shards: Sequence[str]) -> tuple[str, ...]:
    """Those trained on any of the shards, and those that go on from one of these, by id."""
    table, seen = schema.models.c, set(shards)
    rows = list(connection.execute(select(table.id, table.parent, table.trained_on)))
    found = {model_id for model_id, _, trained_on in rows if seen.intersection(trained_on)}
    while more := {model_id for model_id, parent, _ in rows if parent in found} - found:
        found |= more
    return tuple(sorted(found))


def _remove(connection: Connection, image_id: str) -> None:
    tasks = schema.tasks.c
    of_tasks = select(tasks.id).where(tasks.image_id == image_id)
    # Tasks first, as a submission does: PostgreSQL then lets one of the two wait, not both.
    connection.execute(of_tasks.with_for_update())
    submitted = schema.submissions
    connection.execute(delete(submitted).where(submitted.c.task_id.in_(of_tasks)))
    for table in (schema.masks, schema.reviews, schema.tasks, schema.shard_images):
        connection.execute(delete(table).where(table.c.image_id == image_id))
    connection.execute(delete(schema.images).where(schema.images.c.id == image_id))
