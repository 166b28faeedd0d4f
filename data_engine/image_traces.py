"""Where an image has left something: rows, shards, models, encoded copies and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_engine.engine import Engine
from data_engine.image_copies import copies_of
from data_engine.mask_store.lineage import everything_from, tombstones
from data_engine.measure import HELD_OUT
from data_engine.records import Lineage
from data_engine.round_parts import IMAGES
from data_engine.shards_of_round import SHARDS
from sam_train.data.sa1b import is_wanted
from sam_train.data.tar_samples import read_samples

CURVES = "curves.png"
"""A picture that shows no image."""
PAGES = ("report.html", "report.md")


@dataclass(frozen=True, kw_only=True)
class Traces:
    """All that came from an image.

    Attributes:
        key: its name in shards.
        lineage: its rows, and the shards and models that these lead to.
        shards: files that hold it, of the engine's own: those of rounds, held-out ones, inputs of a stage.
        copies: its file in the engine's folder, where images are copied.
        embeddings: files of it, encoded.
        pictures: files that may show it.
    """

    key: str
    lineage: Lineage
    shards: tuple[str, ...]
    copies: tuple[str, ...]
    embeddings: tuple[str, ...]
    pictures: tuple[str, ...]

    def __str__(self) -> str:
        own = self.lineage
        parts = {
            "tasks": own.tasks,
            "masks of people": own.masks,
            "reviews": own.reviews,
            "rounds": tuple(map(str, own.rounds)),
            "shards": self.shards,
            "models that have learnt from it": own.models,
            "copies": self.copies,
            "embeddings": self.embeddings,
            "pictures that may show it": self.pictures,
        }
        lines = [f"{self.key} ({own.image_id})"]
        lines += [f"{name}: {', '.join(found)}" for name, found in parts.items() if found]
        return "\n".join(lines)


def traces(engine: Engine, name: str) -> Traces:
    """Names all that came from an image, by its key or hash.

    Raises:
        ValueError: there is no such image.
    """
    image_id, key = identified(engine, name)
    lineage = everything_from(engine.store, image_id)
    shards = [path for path in shard_files(engine) if holds(path, key)]
    is_held_out = any(path.parent.name == HELD_OUT for path in shards)
    pictures = [
        *pictures_of_rounds(engine, lineage.rounds),
        *(pictures_of_measuring(engine) if is_held_out else ()),
        *pictures_of_training(engine),
    ]
    return Traces(
        key=key,
        lineage=lineage,
        shards=tuple(map(engine.relative, shards)),
        copies=tuple(map(engine.relative, copies_of(engine.root, image_id))),
        embeddings=tuple(map(engine.relative, embeddings(engine, image_id))),
        pictures=tuple(sorted(map(engine.relative, pictures))),
    )


def identified(engine: Engine, name: str) -> tuple[str, str]:
    """An image's hash and key by either of them, also of one that was taken down.

    Raises:
        ValueError: there is no such image.
    """
    by_key = engine.store.images_by_key([name])
    by_id = engine.store.images_by_id([name])
    for image in (*by_key.values(), *by_id.values()):
        return image.id, image.key
    for stone in tombstones(engine.store):
        if name in (stone.key, stone.image_id):
            return stone.image_id, stone.key
    raise ValueError(f"image={name}: no image of this key or hash is registered in {engine.root}")


def shard_files(engine: Engine) -> Iterator[Path]:
    """All shards in the engine's folder, whether the store knows of them or not."""
    yield from sorted((engine.root / HELD_OUT).glob("*.tar"))
    for folder in (IMAGES, SHARDS):
        yield from sorted(engine.root.glob(f"rounds/*/{folder}/*.tar"))


def holds(path: Path, key: str) -> bool:
    """Whether a shard has an image; of one that breaks off, whether it has it before that."""
    try:
        return any(sample.key == key for sample in read_samples(str(path), is_wanted))
    except OSError:
        return False


def embeddings(engine: Engine, image_id: str) -> Iterator[Path]:
    """An image as it was encoded for annotators, and what a killed process left of that."""
    for name in (f"{image_id}.safetensors", f".{image_id}.safetensors.*"):
        yield from engine.root.glob(f"rounds/*/embeddings/*/{name}")


def pictures_of_rounds(engine: Engine, rounds: Iterable[int]) -> Iterator[Path]:
    """The pictures of reports, and the pages that they are in."""
    for number in rounds:
        folder = engine.round_folder(number)
        yield from folder.glob("figures/*")
        for name in PAGES:
            yield from (path for path in folder.glob(f"*{name}*") if path.is_file())


def pictures_of_measuring(engine: Engine) -> Iterator[Path]:
    """The pictures that held-out images are shown in."""
    for place in ("eval", "rounds/*/eval"):
        yield from _pictures(engine.root.glob(f"{place}/*/*/figures/*"))


def pictures_of_training(engine: Engine) -> Iterator[Path]:
    """The pictures in the run folders of trainings."""
    yield from _pictures(engine.root.glob("rounds/*/training_*/figures/*"))


def _pictures(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if path.name != CURVES and path.is_file())
