"""Images that a table allows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sam_train import config
from sam_train.data.listed import ListedSource
from sam_train.structures import ImageRecord


@dataclass(frozen=True, kw_only=True)
class Lettered:
    """Images a, b, c, ..., each with a cursor."""

    letters: str

    def records(self, *, epoch, reader, num_readers, shuffle, start=()):
        (begin,) = start or (0,)
        for place in range(begin, len(self.letters)):
            if place % num_readers == reader:
                yield ImageRecord(
                    self.letters[place],
                    (4, 4),
                    (),
                    lambda: np.zeros((4, 4, 3)),
                    cursor=(place + 1,),
                )


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "licences.csv"
    path.write_text("key,licence\na,free\nb,closed\nc,free\nd,shared\n")
    return str(path)


def keys(source: ListedSource, **where: object) -> list[str]:
    where = {"epoch": 0, "reader": 0, "num_readers": 1, "shuffle": False, **where}
    return [record.key for record in source.records(**where)]


def test_only_what_the_table_allows_is_kept_and_the_rest_is_told(
    table: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = ListedSource(
        source=Lettered(letters="abcde"), list=table, column="licence", allowed=["free", "shared"]
    )

    assert keys(source) == ["a", "c", "d"]
    assert "keeps 3 of 5 images; left out: 1 closed, 1 no row" in caplog.text


def test_a_stream_goes_on_behind_a_kept_image(table: str) -> None:
    source = ListedSource(
        source=Lettered(letters="abcd"), list=table, column="licence", allowed=["free"]
    )
    first = next(source.records(epoch=0, reader=0, num_readers=1, shuffle=False))

    assert keys(source, start=first.cursor) == ["c"]


def test_a_value_that_no_row_has_is_refused_with_those_there_are(table: str) -> None:
    with pytest.raises(ValueError, match="'fre'; there is: closed, free, shared"):
        ListedSource(source=Lettered(letters="a"), list=table, column="licence", allowed=["fre"])


def test_a_column_that_is_not_there_is_refused(table: str) -> None:
    with pytest.raises(ValueError, match="no column license; it has key, licence"):
        ListedSource(source=Lettered(letters="a"), list=table, column="license", allowed=["free"])


def test_a_byte_order_mark_and_a_short_row_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_text("\ufeffkey,licence\na,free\nb\n", encoding="utf-8")
    listed = {"source": Lettered(letters="ab"), "list": str(path), "column": "licence"}
    assert keys(ListedSource(**listed, allowed=["free"])) == ["a"]
    with pytest.raises(ValueError, match="no row of"):
        ListedSource(**listed, allowed=["fre"])


def test_the_open_recipe_reads_38_coco_images(shared_data: Path) -> None:
    cfg = config.compose("train", ["data=small_sets_open", f"paths.data={shared_data}"])
    source = config.instantiate(cfg.data.sets.coco_panoptic_open.train)

    assert len(keys(source)) == 38
