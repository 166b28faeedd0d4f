"""A store opens, is upgraded, or says in one sentence why not."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from data_engine.mask_store.connect import StoreError, make_engine
from data_engine.mask_store.migrate import migrate
from data_engine.mask_store.schema import metadata
from data_engine.mask_store.store import open_store
from data_engine.records import Image, Round, Task
from data_engine.tasks import Desk

FIRST = "0001"


def test_a_store_opens_again_with_what_is_in_it(
    store_url: str, image: Callable[..., Image]
) -> None:
    made = open_store(store_url, create=True)
    made.add_images([image("a")])
    made.close()

    for create in (False, True):
        again = open_store(store_url, create=create)
        assert again.num_images() == 1
        again.close()


def test_many_that_make_a_store_at_once_make_one(store_url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: open_store(store_url, create=True), range(6)))

    for number, store in enumerate(made):
        store.put_round(Round(number=number, stage="assisted", state="open", plan_step=0))
    assert len(made[0].rounds()) == 6
    for store in made:
        store.close()


def test_an_older_store_is_upgraded_and_keeps_its_rows(
    store_url: str, image: Callable[..., Image]
) -> None:
    engine = make_engine(store_url, create=True)
    migrate(engine, create=True, revision=FIRST)
    with engine.begin() as connection:
        connection.execute(metadata.tables["images"].insert(), vars(image("a")))
    engine.dispose()

    store = open_store(store_url)

    assert store.image("a") == image("a")
    assert store.reviews() == []
    store.close()


def test_the_migrations_make_the_tables_of_the_schema(store_url: str) -> None:
    store = open_store(store_url, create=True)
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, metadata)
    store.close()

    assert differences == []


def test_a_store_of_a_newer_version_is_refused(store_url: str) -> None:
    store = open_store(store_url, create=True)
    with store.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()

    with pytest.raises(StoreError, match="newer version.*9999.*upgrade sam-train"):
        open_store(store_url, create=True)


def test_a_database_of_something_else_is_refused_and_left_alone(store_url: str) -> None:
    engine = make_engine(store_url, create=True)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE accounts (id INTEGER)"))
    engine.dispose()

    with pytest.raises(StoreError, match="something else.*accounts"):
        open_store(store_url, create=True)


def test_an_empty_database_is_no_store(store_url: str) -> None:
    make_engine(store_url, create=True).dispose()

    with pytest.raises(StoreError, match="is empty.*data-engine init"):
        open_store(store_url)


def test_a_missing_store_is_not_made_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store.*data-engine init"):
        open_store(tmp_path / "engine.sqlite")

    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "engine.sqlite"
    path.write_text("a letter, and not a short one\n" * 100)

    with pytest.raises(StoreError, match="is no SQLite file"):
        open_store(path, create=True)

    assert path.read_text().startswith("a letter")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://user:secret@host/x", r"postgresql://.*got mysql://user:\*\*\*@host/x"),
        ("postgresql://user:secret@127.0.0.1:1/x", r"user:\*\*\*@127.0.0.1:1/x does not answer"),
    ],
)
def test_what_is_wrong_with_a_url_is_said_without_the_password(url: str, reason: str) -> None:
    with pytest.raises(StoreError, match=reason) as caught:
        open_store(url)

    assert "secret" not in str(caught.value)


def test_a_locked_store_says_so_and_goes_on_afterwards(
    tmp_path: Path, image: Callable[..., Image]
) -> None:
    path = tmp_path / "engine.sqlite"
    store = open_store(path, create=True, busy_timeout_s=0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreError, match="is locked"):
        store.add_images([image("a")])
    assert store.num_images() == 0  # who only reads does not wait
    other.execute("ROLLBACK")
    other.close()

    assert store.add_images([image("a")]) == 1
    store.close()


@pytest.mark.postgres
def test_a_locked_table_of_postgresql_says_so(
    postgres_url: str, image: Callable[..., Image]
) -> None:
    store = open_store(postgres_url, create=True, busy_timeout_s=0.1)
    with store.write() as connection:
        connection.execute(text("LOCK TABLE images"))
        with pytest.raises(StoreError, match="is locked"):
            store.add_images([image("a")])
    store.close()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_store_whose_file_goes_or_is_replaced_says_so_and_loses_nothing_quietly(
    tmp_path: Path, image: Callable[..., Image], is_replaced: bool
) -> None:
    path = tmp_path / "engine.sqlite"
    store = open_store(path, create=True)
    if is_replaced:
        shutil.copy(path, tmp_path / "copy")
        (tmp_path / "copy").replace(path)
    else:
        path.unlink()

    with pytest.raises(StoreError, match="is gone"):
        store.add_images([image("a")])

    assert path.exists() == is_replaced
    store.close()


def test_what_is_written_after_others_came_and_went_is_there(
    tmp_path: Path, image: Callable[..., Image]
) -> None:
    """A file that is opened and closed beside SQLite lets go of its locks, and a visitor removes the log."""
    path = tmp_path / "engine.sqlite"
    first = open_store(path, create=True)
    second = open_store(path)
    second.add_images([image("a")])
    look = f"from data_engine.mask_store.store import open_store; s = open_store({str(path)!r})"

    for name in "bcd":
        visit = f"{look}; print(s.num_images()); s.close()"
        subprocess.run([sys.executable, "-c", visit], check=True)
        first.add_images([image(name)])

    visit = f"{look}; print(s.num_images())"
    seen = subprocess.run([sys.executable, "-c", visit], check=True, capture_output=True, text=True)
    assert seen.stdout.strip() == "4"
    first.close()
    second.close()


def test_a_log_that_goes_while_it_is_in_use_is_told(
    tmp_path: Path, image: Callable[..., Image]
) -> None:
    path = tmp_path / "engine.sqlite"
    store = open_store(path, create=True)
    store.add_images([image("a")])
    Path(f"{path}-wal").unlink()

    with pytest.raises(StoreError, match="-wal is gone or was replaced"):
        store.add_images([image("b")])

    store.close()


def test_a_full_disk_says_so_and_leaves_no_half_of_a_submission(
    tmp_path: Path, image: Callable[..., Image]
) -> None:
    store = open_store(tmp_path / "engine.sqlite", create=True)
    store.add_images([image("a")])
    with store.read() as connection:
        num_pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {num_pages}")

    with pytest.raises(StoreError, match="disk is full"):
        Desk(store).add_tasks(
            Task(id=f"t{number}", round=1, stage="assisted", image_id="a", payload={"x": "y" * 999})
            for number in range(100)
        )

    assert store.tasks() == []
    store.close()
