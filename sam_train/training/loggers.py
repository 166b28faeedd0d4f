"""`metrics.csv`, a row a log step, at one place of the run folder and whole again after a resume."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class CSVLogger(Logger):
    """Writes what is logged to one CSV file.

    All that is logged at a step shares a row, and a metric seen for the first time adds a column. When
    a run goes on, rows at or after its first step are those of steps that are run again: they go.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._row_start = 0  # byte at which the current step's row begins

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Nothing to do: the run folder holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds `metrics` to the row of `step`."""
        step = int(step or 0)
        if not self._columns:
            self._take_over(step)
        if self._row.get("step") != step:
            self.save()
            self._row, self._row_start = {"step": step}, self._size()
        self._row |= {key: float(value) for key, value in metrics.items()}
        if new := [key for key in self._row if key not in self._columns]:
            self._rewrite(self._rows(before_byte=self._row_start), self._columns + sorted(new))

    @rank_zero_only
    def save(self) -> None:
        """Puts the current row on disk; more may still be added to it."""
        if not self._row:
            return
        with self.path.open("r+b") as file:
            file.truncate(self._row_start)
            file.seek(self._row_start)
            file.write(self._lines([self._row]))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _take_over(self, step: int) -> None:
        rows = [row for row in self._rows() if int(float(row["step"])) < step]
        self._rewrite(rows, list(rows[0]) if rows else ["step"])

    def _rows(self, before_byte: int | None = None) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        text = self.path.read_bytes()[:before_byte].decode()
        return [row for row in csv.DictReader(io.StringIO(text)) if row.get("step")]

    def _rewrite(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        self._columns = columns
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = ",".join(columns).encode() + b"\n"
        partial = self.path.with_suffix(".csv.part")
        partial.write_bytes(header + self._lines(rows))
        partial.replace(self.path)
        self._row_start = self._size()

    def _lines(self, rows: list[dict[str, Any]]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0
