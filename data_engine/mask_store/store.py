"""The store: records in and out. This folder holds the project's only SQL.

`leases.py` has that of the task desk, `lineage.py` what came from an image, `backup.py` copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Select, Table, delete, exists, func, select

from data_engine.mask_store import schema
from data_engine.mask_store.connect import explained, make_engine, where
from data_engine.mask_store.migrate import migrate
from data_engine.mask_store.rows import CHUNK, Record, chunks, from_row, insert_new, put, to_row
from data_engine.records import (
    Image,
    Mask,
    Model,
    Review,
    Round,
    Shard,
    StoredSubmission,
    Task,
)


def open_store(url: str | Path, *, create: bool = False, busy_timeout_s: float = 30.0) -> Store:
    """Opens the store, after upgrading it where it is of an older version.

    Args:
        url: path of a SQLite file, `sqlite:///PATH` or `postgresql://USER@HOST/DATABASE`.
        create: whether to make it where there is none.
        busy_timeout_s: how long to wait for another writer.

    Raises:
        StoreError: one sentence: it is missing, locked, of a newer version or no store at all.
    """
    engine = make_engine(url, create=create, busy_timeout_s=busy_timeout_s)
    try:
        migrate(engine, create=create)
    except BaseException:
        engine.dispose()
        raise
    return Store(engine)


class Store:
    """All `add_*` leave what is known as it is and return how many were new; all `put_*` overwrite.

    Each call is one transaction. Threads may share a store; a process opens its own. Every call raises
    `StoreError`, a sentence, where the database is locked, gone or full; nothing is then half-done.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writer = engine.execution_options(write=True)

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return where(self.engine)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that reads; for this folder and the desk."""
        with explained(self.engine), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes: all of it or nothing."""
        with explained(self.engine), self._writer.begin() as connection:
            yield connection

    def close(self) -> None:
        """Lets go of all connections."""
        self.engine.dispose()

    def add_images(self, images: Iterable[Image]) -> int:
        """Registers images; those that were taken down are left out."""
        num_new = 0
        with self.write() as connection:
            for chunk in chunks(images, CHUNK):
                gone = self._gone(connection, [image.id for image in chunk])
                rows = [to_row(image) for image in chunk if image.id not in gone]
                num_new += insert_new(connection, schema.images, rows)
        return num_new

    def _gone(self, connection: Connection, image_ids: Sequence[str]) -> set[str]:
        column = schema.tombstones.c.image_id
        return set(connection.scalars(select(column).where(column.in_(image_ids))))

    def taken_down(self, image_ids: Sequence[str]) -> set[str]:
        """Those of these that were taken down."""
        with self.read() as connection:
            return set().union(*(self._gone(connection, ids) for ids in chunks(image_ids, CHUNK)))

    def images_by_id(self, image_ids: Sequence[str]) -> dict[str, Image]:
        """Those of these that are registered."""
        return self._images_by("id", image_ids)

    def images_by_key(self, keys: Sequence[str]) -> dict[str, Image]:
        """The images that have these keys."""
        return self._images_by("key", keys)

    def _images_by(self, name: str, values: Sequence[str]) -> dict[str, Image]:
        found: dict[str, Image] = {}
        with self.read() as connection:
            for chunk in chunks(values, CHUNK):
                query = select(schema.images).where(schema.images.c[name].in_(chunk))
                for row in connection.execute(query):
                    found[row._mapping[name]] = from_row(Image, row)
        return found

    def forget_images(self) -> None:
        """Removes all images and models, as long as there is no round: of an `init` that was given up."""
        with self.write() as connection:
            if connection.execute(select(schema.rounds).limit(1)).first() is None:
                for table in (schema.models, schema.images):
                    connection.execute(delete(table))

    def put_image(self, image: Image) -> None:
        """Stores an image as it now is, where it lies elsewhere say."""
        self._put(schema.images, to_row(image))

    def image(self, image_id: str) -> Image:
        """One image.

        Raises:
            KeyError: it is not registered, or was taken down.
        """
        found = self._one(Image, schema.images, id=image_id)
        if found is None:
            raise KeyError(f"no image {image_id} is registered in {self.name}")
        return found

    def images(self, *, held_out: bool | None = None) -> Iterator[Image]:
        """Images by id, streamed."""
        return self._stream(Image, _chosen(schema.images, held_out=held_out).order_by("id"))

    def untouched_images(self, *, before_round: int) -> Iterator[Image]:
        """Images that are not held out, and that no task or shard of an earlier round had; by id, streamed."""
        image, task, held = schema.images.c, schema.tasks.c, schema.shard_images.c
        tasks = exists().where(
            task.image_id == image.id, task.round < before_round, task.state != "withdrawn"
        )
        shards = exists().where(
            held.image_id == image.id,
            held.shard_path == schema.shards.c.path,
            schema.shards.c.round < before_round,
        )
        query = select(schema.images).where(~image.held_out, ~tasks, ~shards).order_by(image.id)
        return self._stream(Image, query)

    def num_images(self, *, held_out: bool | None = None) -> int:
        """How many `images` gives."""
        return self._count(_chosen(schema.images, held_out=held_out))

    def task(self, task_id: str) -> Task | None:
        """One task."""
        return self._one(Task, schema.tasks, id=task_id)

    def tasks(
        self,
        *,
        round: int | None = None,
        stage: str | None = None,
        state: str | None = None,
        image_id: str | None = None,
    ) -> list[Task]:
        """Tasks by id."""
        query = _chosen(schema.tasks, round=round, stage=stage, state=state, image_id=image_id)
        return list(self._stream(Task, query.order_by("id")))

    def count_tasks(self, *, round: int | None = None, stage: str | None = None) -> dict[str, int]:
        """How many tasks there are of each state that occurs."""
        state = schema.tasks.c.state
        chosen = _chosen(schema.tasks, round=round, stage=stage)
        query = chosen.with_only_columns(state, func.count())
        with self.read() as connection:
            rows = connection.execute(query.group_by(state)).all()
            return {str(name): int(number) for name, number in rows}

    def annotators(self, *, round: int | None = None) -> list[str]:
        """Who did tasks, sorted."""
        name = schema.tasks.c.annotator
        query = _chosen(schema.tasks, round=round, state="done").with_only_columns(name)
        with self.read() as connection:
            return sorted(connection.scalars(query.distinct()))

    def masks(
        self,
        *,
        round: int | None = None,
        source: str | None = None,
        image_id: str | None = None,
        task_id: str | None = None,
    ) -> Iterator[Mask]:
        """Masks by image, then id, streamed."""
        query = _chosen(
            schema.masks, round=round, source=source, image_id=image_id, task_id=task_id
        )
        return self._stream(Mask, query.order_by("image_id", "id"))

    def num_masks(self, *, round: int | None = None, source: str | None = None) -> int:
        """How many masks there are."""
        return self._count(_chosen(schema.masks, round=round, source=source))

    def submissions(self, *, round: int | None = None) -> Iterator[StoredSubmission]:
        """What was handed in, with its events, by task; streamed."""
        of_task = schema.tasks.c.id == schema.submissions.c.task_id
        query = select(schema.submissions).join(schema.tasks, of_task).order_by("task_id")
        if round is not None:
            query = query.where(schema.tasks.c.round == round)
        return self._stream(StoredSubmission, query)

    def put_round(self, round: Round) -> None:
        """Stores a round as it now stands."""
        self._put(schema.rounds, to_row(round))

    def round(self, number: int) -> Round | None:
        """One round."""
        return self._one(Round, schema.rounds, number=number)

    def rounds(self) -> list[Round]:
        """All rounds, by number."""
        return list(self._stream(Round, select(schema.rounds).order_by("number")))

    def put_model(self, model: Model) -> None:
        """Stores a model as it now stands."""
        self._put(schema.models, to_row(model))

    def model(self, model_id: str) -> Model | None:
        """One model."""
        return self._one(Model, schema.models, id=model_id)

    def models(self) -> list[Model]:
        """All models, the first ones first: by round, those before any round ahead, then by id."""
        query = select(schema.models).order_by(func.coalesce(schema.models.c.round, -1), "id")
        return list(self._stream(Model, query))

    def add_reviews(self, reviews: Iterable[Review]) -> int:
        """Stores second looks, all or none."""
        with self.write() as connection:
            return insert_new(connection, schema.reviews, map(to_row, reviews))

    def reviews(self, *, round: int | None = None, image_id: str | None = None) -> list[Review]:
        """Second looks, by id."""
        query = _chosen(schema.reviews, round=round, image_id=image_id)
        return list(self._stream(Review, query.order_by("id")))

    def put_shard(self, shard: Shard, image_ids: Iterable[str]) -> None:
        """Stores what a shard holds, once it is whole and in place."""
        of_shard = schema.shard_images.c.shard_path == shard.path
        rows = ({"shard_path": shard.path, "image_id": image_id} for image_id in image_ids)
        with self.write() as connection:
            put(connection, schema.shards, to_row(shard))
            connection.execute(delete(schema.shard_images).where(of_shard))
            insert_new(connection, schema.shard_images, rows)

    def shards(self, *, round: int | None = None, source: str | None = None) -> list[Shard]:
        """Shards of the engine's own, by path."""
        query = _chosen(schema.shards, round=round, source=source)
        return list(self._stream(Shard, query.order_by("path")))

    def claim(self, name: str, holder: str, *, now: float, lease_s: float) -> bool:
        """Claims anything that has a name, a shard to be made say, or extends a claim.

        Returns:
            Whether `holder` has it now: nobody else's claim is alive.
        """
        row = {"name": name, "holder": holder, "lease_expires_at": now + lease_s}
        table = schema.claims.c
        is_free = (table.holder == holder) | (table.lease_expires_at <= now)
        with self.write() as connection:
            return put(connection, schema.claims, row, where=is_free)

    def unclaim(self, name: str, holder: str) -> None:
        """Gives up a claim; nothing happens where `holder` has it no more."""
        table = schema.claims
        mine = (table.c.name == name) & (table.c.holder == holder)
        with self.write() as connection:
            connection.execute(delete(table).where(mine))

    def contents(self, *, wall_clock: bool = False) -> dict[str, list[dict[str, Any]]]:
        """All rows by table, in order of their keys, to compare two stores; all in memory.

        Args:
            wall_clock: whether with the columns that tell times, which no two runs share.
        """
        left_out = frozenset() if wall_clock else schema.WALL_CLOCK
        with self.read() as connection:
            return {
                table.name: [
                    {name: value for name, value in row._mapping.items() if name not in left_out}
                    for row in connection.execute(select(table).order_by(*table.primary_key))
                ]
                for table in schema.metadata.sorted_tables
            }

    def _put(self, table: Table, row: dict[str, Any]) -> None:
        with self.write() as connection:
            put(connection, table, row)

    def _count(self, query: Select[Any]) -> int:
        with self.read() as connection:
            return connection.execute(
                select(func.count()).select_from(query.subquery())
            ).scalar_one()

    def _one(self, kind: type[Record], table: Table, **values: Any) -> Record | None:
        with self.read() as connection:
            row = connection.execute(_chosen(table, **values)).one_or_none()
        return None if row is None else from_row(kind, row)

    def _stream(self, kind: type[Record], query: Select[Any]) -> Iterator[Record]:
        with (
            self.read() as connection,
            # Closed also where the reader stops early: on a server the cursor would stay.
            connection.execution_options(yield_per=CHUNK).execute(query) as rows,
        ):
            for row in rows:
                yield from_row(kind, row)


def _chosen(table: Table, **values: Any) -> Select[Any]:
    """The rows of a table whose columns have these values; None leaves a column open."""
    query = select(table)
    for name, value in values.items():
        if value is not None:
            query = query.where(table.c[name] == value)
    return query
