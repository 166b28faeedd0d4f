"""The part of a data set that a table allows: images whose row in a CSV file has one of some values."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sam_train.data.source import Source
from sam_train.structures import Cursor, ImageRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ListedSource:
    """A `Source` of those images of another whose row in a table says so, by licence for one.

    An image without a row is left out. How many are kept, and why the others are not, is logged when
    the source is first gone through.

    Attributes:
        source: what is filtered.
        list: a CSV file with a header.
        column: the column that decides.
        allowed: the values in it that keep an image.
        key_column: the column of the images' keys.
    """

    source: Source
    list: str
    column: str
    allowed: Sequence[str]
    key_column: str = "key"
    _values: Mapping[str, str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        values = _read_columns(Path(self.list), self.key_column, self.column)
        known = Counter(values.values())
        if unknown := [value for value in self.allowed if value not in known]:
            raise ValueError(
                f"no row of {self.list} has {self.column} = {' or '.join(map(repr, unknown))}; "
                f"there is: {', '.join(sorted(known))}"
            )
        if not self.allowed:
            raise ValueError(f"allowed names no value of {self.column}: every image is left out")
        object.__setattr__(self, "_values", values)

    def records(
        self, *, epoch: int, reader: int, num_readers: int, shuffle: bool, start: Cursor = ()
    ) -> Iterator[ImageRecord]:
        """See `Source.records`."""
        kept, left_out = 0, Counter[str]()
        for record in self.source.records(
            epoch=epoch, reader=reader, num_readers=num_readers, shuffle=shuffle, start=start
        ):
            value = self._values.get(record.key, "no row")
            if value in self.allowed:
                kept += 1
                yield record
            else:
                left_out[value] += 1
        if epoch == 0 and not start:
            self._report(kept, left_out, reader, num_readers)

    def _report(self, kept: int, left_out: Counter[str], reader: int, num_readers: int) -> None:
        reasons = ", ".join(f"{count} {value}" for value, count in left_out.most_common())
        log.info(
            "%s keeps %d of %d images%s%s",
            self.list,
            kept,
            kept + left_out.total(),
            f" of reader {reader + 1} of {num_readers}" if num_readers > 1 else "",
            f"; left out: {reasons}" if reasons else "",
        )


def _read_columns(path: Path, key_column: str, column: str) -> dict[str, str]:
    """Two columns of a CSV file, as a mapping."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        names = rows.fieldnames or []
        if missing := [name for name in (key_column, column) if name not in names]:
            raise ValueError(
                f"{path} has no column {' and no column '.join(missing)}; it has {', '.join(names)}"
            )
        return {row[key_column] or "": row[column] or "" for row in rows}
