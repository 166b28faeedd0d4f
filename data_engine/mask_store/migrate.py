"""Brings a database to this version's tables, by Alembic, when it is opened."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from data_engine.mask_store.connect import StoreError, explained, where

MIGRATIONS = Path(__file__).parent / "migrations"
ADVISORY_LOCK = 0x5A4D  # any number, the same in every process of the engine


def migrate(engine: Engine, *, create: bool, revision: str = "head") -> None:
    """Makes the tables where there are none and `create` is true, and upgrades older ones.

    Raises:
        StoreError: there are none, they are of a newer version, or of something else.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    with explained(engine):
        with engine.begin() as connection:
            if MigrationContext.configure(connection).get_current_revision() == (
                scripts.get_current_head() if revision == "head" else revision
            ):
                return
        with engine.execution_options(write=True).begin() as connection:
            if engine.name == "postgresql":
                # Two that open it at once: the second finds it done. SQLite lets one write anyway.
                lock = text("SELECT pg_advisory_xact_lock(:number)")
                connection.execute(lock, {"number": ADVISORY_LOCK})
            _check(connection, scripts, where(engine), create)
            config.attributes["connection"] = connection
            command.upgrade(config, revision)


def _check(connection: Connection, scripts: ScriptDirectory, name: str, create: bool) -> None:
    current = MigrationContext.configure(connection).get_current_revision()
    if current is None:
        if tables := inspect(connection).get_table_names():
            raise StoreError(
                f"{name} holds something else, no store (its tables: {', '.join(sorted(tables)[:5])})"
            )
        if not create:
            raise StoreError(f"{name} is empty; make a store with `data-engine init`")
    elif current not in {script.revision for script in scripts.walk_revisions()}:
        raise StoreError(
            f"{name} was made by a newer version of sam-train (its tables are of version {current}, "
            f"this one knows up to {scripts.get_current_head()}): upgrade sam-train to open it"
        )
