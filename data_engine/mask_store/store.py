"""The store: records in and out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_engine.records import (
    Image,
    Mask,
    Model,
    Receipt,
    Review,
    Round,
    Shard,
    Submission,
    Task,
)


def open_store(url: str | Path, *, create: bool = False, busy_timeout_s: float = 30.0) -> Store:
    """Opens the store, after upgrading it where it is of an older version.

    Args:
        url: path of a SQLite file, `sqlite:///PATH` or `postgresql://...`.
        create: whether to make it where there is none.
        busy_timeout_s: how long to wait for another writer.

    Raises:
        StoreError: one sentence: it is missing, locked, of a newer version or no store at all.
    """


class Store:
    """All `add_*` leave what is known as it is and return how many were new; all `put_*` overwrite."""

    def close(self) -> None: ...

    def add_images(self, images: Iterable[Image]) -> int:
        """Leaves out what was taken down."""

    def image(self, image_id: str) -> Image: ...
    def images(self, *, held_out: bool | None = None) -> Iterator[Image]:
        """By id, streamed."""

    def num_images(self, *, held_out: bool | None = None) -> int: ...

    def tasks(
        self, *, round: int | None = None, state: str | None = None, image_id: str | None = None
    ) -> list[Task]: ...
    def count_tasks(self, *, round: int | None = None) -> dict[str, int]:
        """How many there are of each state."""

    def masks(
        self,
        *,
        round: int | None = None,
        source: str | None = None,
        image_id: str | None = None,
        task_id: str | None = None,
    ) -> Iterator[Mask]:
        """By image, then id, streamed."""

    def submissions(self, *, round: int | None = None) -> Iterator[tuple[Submission, Receipt]]:
        """With events, without masks; by task."""

    def put_round(self, round: Round) -> None: ...
    def round(self, number: int) -> Round | None: ...
    def rounds(self) -> list[Round]: ...

    def put_model(self, model: Model) -> None: ...
    def model(self, model_id: str) -> Model | None: ...
    def models(self) -> list[Model]:
        """By round, then time."""

    def add_reviews(self, reviews: Iterable[Review]) -> int: ...
    def reviews(self, *, round: int | None = None) -> list[Review]: ...

    def put_shard(self, shard: Shard, image_ids: Sequence[str]) -> None: ...
    def shards(self, *, round: int | None = None, source: str | None = None) -> list[Shard]: ...

    def claim(self, name: str, holder: str, *, now: float, lease_s: float) -> bool:
        """Whether `holder` may work on `name` (a shard, say) now: nobody else's claim is alive."""

    def unclaim(self, name: str, holder: str) -> None: ...
