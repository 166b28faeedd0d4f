"""A backup is a store with the same in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_engine.mask_store.backup import back_up, copy_rows
from data_engine.mask_store.connect import StoreError
from data_engine.mask_store.store import open_store
from data_engine.records import Shard, Submission, Task
from data_engine.tasks import Desk


@pytest.fixture
def busy_desk(desk: Desk) -> Desk:
    """One task done, one leased; a shard."""
    desk.add_tasks(Task(id=f"t{n}", round=1, stage="assisted", image_id="a") for n in range(2))
    task = desk.next_task("anna")
    assert task is not None
    desk.submit(Submission(submission_id="s", task_id=task.id, version=1), "anna")
    desk.next_task("anna")
    shard = Shard(path="s.tar", round=1, source="assisted", num_images=1, num_masks=0, sha256="")
    desk.store.put_shard(shard, ["a"])
    return desk


def test_a_backup_opens_as_a_store_with_the_same_in_it(busy_desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "backups" / "monday.sqlite"

    back_up(busy_desk.store, path)

    assert [found.name for found in path.parent.iterdir()] == ["monday.sqlite"]
    copy = open_store(path)
    assert copy.contents(wall_clock=True) == busy_desk.store.contents(wall_clock=True)
    copy.close()


def test_a_backup_does_not_replace_a_file(busy_desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_text("old")

    with pytest.raises(StoreError, match="there already"):
        back_up(busy_desk.store, path)

    assert path.read_text() == "old"


@pytest.mark.postgres
def test_a_backup_goes_back_into_an_empty_database_only(
    busy_desk: Desk, tmp_path: Path, postgres_server: str
) -> None:
    contents = busy_desk.store.contents(wall_clock=True)
    back_up(busy_desk.store, tmp_path / "copy")
    copy, empty = open_store(tmp_path / "copy"), open_store(tmp_path / "new", create=True)

    copy_rows(copy.engine, empty.engine)

    assert empty.contents(wall_clock=True) == contents
    with pytest.raises(StoreError, match="is not empty"):
        copy_rows(copy.engine, busy_desk.store.engine)
    copy.close()
    empty.close()
