"""Stand-in until the stage is merged: one task an image."""

from __future__ import annotations

from collections.abc import Sequence

from data_engine.mask_store.store import Store
from data_engine.records import Image, Task


def assisted_tasks(
    store: Store, round_number: int, images: Sequence[Image], queue: str
) -> list[Task]:
    return [
        Task(
            id=f"{round_number:03d}-{one.id[:16]}",
            round=round_number,
            stage="assisted",
            image_id=one.id,
        )
        for one in images
    ]
