"""`sam-convert check=PATH`: reads every byte of shards, names every fault, draws some of the masks."""

from __future__ import annotations

import glob
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np

from sam_train.convert import pool
from sam_train.convert.check_sample import check_sample
from sam_train.convert.manifest import manifest_faults, sums
from sam_train.data.image_pairs import PairItems, sa1b_source
from sam_train.data.indexed import IndexedSource
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import decode_image, parse_sample
from sam_train.data.tar_samples import read_samples
from sam_train.ops import rle
from sam_train.ops.drawing import captioned, overlay_masks, save_image
from sam_train.ops.files import write_atomically
from sam_train.structures import Annotation

PAIRS_PER_TASK = 1000
MOST_DRAWN_PX = 2 * 10**8
"""Pixels of masks drawn on one picture."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard, or a stretch of an unpacked folder.

    Attributes:
        path: of the shard.
        items, first, last: of the folder, instead.
        num_pictures: to be drawn.
        out: where to.
        sha256: what the manifest says of the shard, if there is one.
    """

    path: str = ""
    items: PairItems | None = None
    first: int = 0
    last: int = 0
    num_pictures: int = 0
    out: Path = Path()
    sha256: str | None = None

    @property
    def name(self) -> str:
        """Where its samples lie, for messages."""
        return self.path if self.items is None else self.items.path


@dataclass
class Checked:
    """What was found in one task.

    Attributes:
        path: of the shard; empty for a folder.
        group: shards of one group have no key in common: those whose names differ in their number.
        faults: name and reason.
        keys, ids: of all its images and masks.
    """

    path: str
    group: str
    faults: list[tuple[str, str]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def check(path: str | Sequence[str], out: Path, num_pictures: int, num_workers: int) -> str:
    """Verifies shards or an unpacked folder; see `Task` and `check_sample`.

    Returns:
        What was verified, in a few lines.

    Raises:
        FileNotFoundError: there are none.
        ValueError: there are faults; the message names the first, `out/faults.txt` all.
    """
    tasks = _tasks(path, out, num_pictures)
    keys: dict[str, Counter[str]] = defaultdict(Counter)
    ids: list[np.ndarray] = []
    faults: list[tuple[str, str]] = []
    found: dict[str, tuple[int, int]] = {}
    for checked in pool.run(check_task, tasks, min(num_workers, len(tasks))):
        found[checked.path] = len(checked.keys), len(checked.ids)
        keys[checked.group].update(checked.keys)
        ids.append(checked.ids)
        faults += checked.faults
    for folder in _folders(path):
        faults += manifest_faults(folder, found)
    faults += [
        (key, f"its key comes {count} times")
        for counts in keys.values()
        for key, count in counts.items()
        if count > 1
    ]
    values, counts = np.unique(np.concatenate(ids), return_counts=True)
    faults += [
        (f"mask id {value}", f"it comes {count} times")
        for value, count in zip(
            values[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True
        )
    ]
    num_images = sum(counts.total() for counts in keys.values())
    said = f"{num_images} images, {sum(map(len, ids))} masks in {len(tasks)} shards or folders"
    if not faults:
        pictures = f"; pictures of some in {out}" if num_pictures else ""
        return f"{said}: no fault{pictures}"
    lines = [f"{name}: {reason}" for name, reason in faults]
    write_atomically(out / "faults.txt", partial(_write, "\n".join(lines) + "\n"))
    more = f"\n... and {len(lines) - 20} more" if len(lines) > 20 else ""
    shown = "\n".join(lines[:20])
    raise ValueError(f"{len(lines)} faults in {said}:\n{shown}{more}\nAll are in {out}/faults.txt")


def _tasks(path: str | Sequence[str], out: Path, num_pictures: int) -> list[Task]:
    source = sa1b_source(path=path)
    if isinstance(source, IndexedSource):
        assert isinstance(source.items, PairItems)
        starts = range(0, len(source.items), PAIRS_PER_TASK)
        places: list[dict[str, Any]] = [
            {"items": source.items, "first": i, "last": min(i + PAIRS_PER_TASK, len(source.items))}
            for i in starts
        ]
    else:
        shards = source.shards()
        of_manifest = {folder: sums(folder) for folder in {Path(shard).parent for shard in shards}}
        places = [
            {"path": shard, "sha256": of_manifest[Path(shard).parent].get(Path(shard).name)}
            for shard in shards
        ]
    quotas = Counter(i * len(places) // max(num_pictures, 1) for i in range(num_pictures))
    return [Task(**place, num_pictures=quotas[i], out=out) for i, place in enumerate(places)]


def _folders(path: str | Sequence[str]) -> list[Path]:
    """The folders among what is to be verified, that is all that their manifests name."""
    stated = [path] if isinstance(path, str) else path
    parts = [part for text in stated for part in str(text).split("::")]
    return [Path(found) for part in parts for found in glob.glob(part) or [part] if isdir(found)]


def check_task(task: Task) -> Iterator[Checked]:
    """Verifies one task's samples."""
    checked = Checked(task.path, re.sub(r"[-_]?\d+$", "", Path(task.path).stem))
    if task.sha256 is not None and _sum(Path(task.path)) != task.sha256:
        checked.faults.append((task.path, "its checksum is not that of manifest.json"))
    ids: list[int] = []
    num_drawn = 0
    for key, files in _until_broken(task, checked):
        checked.keys.append(key)
        annotations, faults = check_sample(files)
        ids += [annotation.id for annotation in annotations]
        checked.faults += [(f"{task.name}:{key}", fault) for fault in faults]
        if num_drawn < task.num_pictures and not faults:
            _draw(task.out, key, files, annotations)
            num_drawn += 1
    if not checked.keys:
        checked.faults.append((task.name, "it holds no image and no JSON"))
    checked.ids = np.array(ids, np.int64)
    yield checked


def _until_broken(task: Task, checked: Checked) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """A task's samples; what ends them early is a fault, unlike what happens to a picture of them."""
    try:
        yield from _samples(task)
    except OSError as error:
        checked.faults.append((task.name, str(error)))


def _samples(task: Task) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    if task.items is not None:
        for index in range(task.first, task.last):
            yield task.items.describe(index), task.items.files(index)
    else:
        for sample in read_samples(task.path, is_wanted):
            yield sample.key, sample.files


def _draw(
    out: Path, key: str, files: Mapping[str, bytes], annotations: Sequence[Annotation]
) -> None:
    suffix, size, _ = parse_sample(files)
    most = max(1, MOST_DRAWN_PX // (size[0] * size[1]))
    masks = rle.decode_many([annotation.rle for annotation in annotations[:most]])
    picture = overlay_masks(decode_image(files[suffix], size), masks.reshape(-1, *size))
    shown = f"{len(masks)} of {len(annotations)}" if len(annotations) > most else f"{len(masks)}"
    picture = captioned(picture, f"{key}: {shown} masks")
    save_image(out / f"{key.replace('/', '_')}.jpg", picture)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(text: str, path: Path) -> None:
    path.write_text(text)
