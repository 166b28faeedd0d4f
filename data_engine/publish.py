"""Copies what an engine made to a folder or to object storage, as fsspec knows it: s3://bucket/engine, say.

Only what is new or has changed is copied. `published.json` names what is there and counts: it is written after
each file. What an image was taken out of is copied anew, and what is gone here is removed there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from data_engine.engine import Engine
from data_engine.mask_store.backup import back_up
from data_engine.shard_writer import finished, manifest_path
from data_engine.shards_of_round import whole_shards
from sam_train.convert.manifest import MANIFEST

log = logging.getLogger(__name__)

INDEX = "published.json"
STORE = "engine.sqlite"
REPORTS = ("report.*", "figures/*")


class Published(NamedTuple):
    """What was done, in files."""

    num_copied: int
    num_there: int
    num_removed: int
    url: str

    def __str__(self) -> str:
        return (
            f"{self.num_copied} files copied, {self.num_there} were there, {self.num_removed} removed: "
            f"see {self.url}"
        )


def publish(engine: Engine, url: str) -> Published:
    """Brings a copy up to date: shards with their manifests, models, reports and the store.

    Args:
        engine: see there.
        url: of a folder, local or not.

    Raises:
        OSError: it cannot be written, or a shard is gone.
        ImportError: fsspec needs a package for this kind of URL; the message names it.
    """
    files, top = fsspec.core.url_to_fs(url)
    top = top.rstrip("/")
    there = _index(files, f"{top}/{INDEX}")
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        copy = Path(folder) / STORE
        back_up(engine.store, copy)
        wanted = {**dict(_made(engine)), STORE: copy}
        num_copied = num_there = 0
        for name, path in wanted.items():
            sha256 = _sum(path)
            if there.get(name) == sha256:
                num_there += 1
                continue
            place = f"{top}/{name}"
            files.makedirs(place.rpartition("/")[0], exist_ok=True)
            files.put_file(str(path), place)
            there[name] = sha256
            _write_index(files, f"{top}/{INDEX}", there)
            num_copied += 1
            log.info("%s: copied", name)
    gone = [name for name in there if name not in wanted]
    for name in gone:
        if files.exists(f"{top}/{name}"):
            files.rm_file(f"{top}/{name}")
        del there[name]
        log.info("%s: removed", name)
    _write_index(files, f"{top}/{INDEX}", there)
    return Published(num_copied, num_there, len(gone), url)


def _made(engine: Engine) -> Iterator[tuple[str, Path]]:
    """Finished work by its place in the engine's folder."""
    for shard in whole_shards(engine):
        path = engine.path(shard.path)
        yield shard.path, path
        yield engine.relative(manifest_path(path)), manifest_path(path)
        yield engine.relative(path.parent / MANIFEST), path.parent / MANIFEST
    for model in engine.store.models():
        yield model.path, engine.path(model.path)
    for round_ in engine.store.rounds():
        for pattern in REPORTS:
            for path in sorted(engine.round_folder(round_.number).glob(pattern)):
                if not path.name.startswith("."):
                    yield engine.relative(path), path


def _sum(path: Path) -> str:
    if (manifest := finished(path) if path.suffix == ".tar" else None) is not None:
        return manifest.sha256
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _index(files: Any, place: str) -> dict[str, str]:
    try:
        return dict(json.loads(files.cat_file(place)))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _write_index(files: Any, place: str, there: dict[str, str]) -> None:
    files.makedirs(place.rpartition("/")[0], exist_ok=True)
    files.pipe_file(place, (json.dumps(there, indent=1) + "\n").encode())
