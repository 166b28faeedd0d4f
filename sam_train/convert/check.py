"""`sam-convert check=PATH`: reads every byte of shards, names every fault, draws some of the masks."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np

from sam_train.convert import pool
from sam_train.data.image_pairs import PairItems, sa1b_source
from sam_train.data.indexed import IndexedSource
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import decode_annotation, decode_image, parse_sample
from sam_train.data.tar_samples import read_samples
from sam_train.ops import rle
from sam_train.ops.drawing import captioned, overlay_masks, save_image
from sam_train.ops.files import write_atomically
from sam_train.structures import Annotation

PAIRS_PER_TASK = 1000
MOST_DRAWN_PX = 2 * 10**8
"""Pixels of masks drawn on one picture."""

HIGHEST = {"predicted_iou": 1.25, "stability_score": 1.0}
"""What the optional scores do not exceed; a predicted IoU is a regression and may pass 1 by a little."""


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
        sums = {folder: _sums(folder) for folder in {Path(shard).parent for shard in shards}}
        places = [
            {"path": shard, "sha256": sums[Path(shard).parent].get(Path(shard).name)}
            for shard in shards
        ]
    quotas = Counter(i * len(places) // max(num_pictures, 1) for i in range(num_pictures))
    return [Task(**place, num_pictures=quotas[i], out=out) for i, place in enumerate(places)]


def _folders(path: str | Sequence[str]) -> list[Path]:
    """The folders among what is to be verified, that is all that their manifests name."""
    stated = [path] if isinstance(path, str) else path
    parts = [part for text in stated for part in str(text).split("::")]
    return [Path(found) for part in parts for found in glob.glob(part) or [part] if isdir(found)]


def _manifest(folder: Path) -> dict[str, Any]:
    """The splits by the manifest in a folder, each with its `shards`; none if there is no such file."""
    try:
        splits = json.loads((folder / "manifest.json").read_text())["splits"]
        for split in splits.values():
            for entry in split["shards"]:
                entry["name"], entry["sha256"]  # else somebody else's
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(splits)


def _sums(folder: Path) -> dict[str, str]:
    """The shards' SHA-256 by the manifest beside them."""
    shards = [entry for split in _manifest(folder).values() for entry in split["shards"]]
    return {entry["name"]: entry["sha256"] for entry in shards}


def manifest_faults(
    folder: Path, found: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Shards that a folder's manifest names and that are gone, and splits of other totals than it states.

    Args:
        folder: of the manifest.
        found: numbers of images and masks, by the path of their shard.
    """
    counts = {Path(path): both for path, both in found.items()}
    for name, split in _manifest(folder).items():
        paths = [folder / entry["name"] for entry in split["shards"]]
        absent = [path for path in paths if path not in counts]
        yield from ((str(path), "manifest.json names it, and it is absent") for path in absent)
        for number, what in enumerate(("images", "masks")):
            total = sum(counts[path][number] for path in paths if path in counts)
            if not absent and split.get(what, total) != total:
                reason = f"manifest.json states {split[what]} {what}, its shards hold {total}"
                yield f"{folder}: {name}", reason


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


def check_sample(files: Mapping[str, bytes]) -> tuple[list[Annotation], list[str]]:
    """A sample's annotations that can be read, and everything that is wrong with it.

    The image decodes and has the stated size. Each mask's run lengths have that size and sum, and a pixel
    at least; `area` is theirs, `bbox` within a pixel (SA-1B's own ends at the last pixel, ours after it).
    Scores are in range, points and crop boxes inside the image.
    """
    try:
        suffix, size, entries = parse_sample(files)
    except ValueError as error:
        return [], [str(error)]
    faults: list[str] = []
    try:
        decode_image(files[suffix], size)
    except ValueError as error:
        faults.append(str(error))
    annotations = []
    for index, entry in enumerate(entries):
        try:
            annotation = decode_annotation(index, entry, size)
            annotations.append(annotation)
            runs = rle.Runs(annotation.rle)
        except ValueError as error:
            text = str(error)
            faults.append(text if text.startswith("annotation") else f"annotation {index}: {text}")
            continue
        faults += [f"annotation {index}: {fault}" for fault in _mismatches(annotation, runs, size)]
    return annotations, faults


def _mismatches(annotation: Annotation, runs: rle.Runs, size: tuple[int, int]) -> Iterable[str]:
    area = runs.area
    x0, y0, x1, y1 = runs.box()
    box = (x0, y0, x1 - x0, y1 - y0)
    if area == 0:
        yield "its mask is empty"
    if annotation.area != area:
        yield f"its area is {annotation.area:g}, that of its RLE {area}"
    if np.abs(np.subtract(annotation.bbox, box)).max() > 1:
        yield f"its bbox is {list(annotation.bbox)}, that of its RLE {list(box)}"
    for name, highest in HIGHEST.items():
        value = getattr(annotation, name)
        if value is not None and not 0 <= value <= highest:
            yield f"its {name} is {value:g}, expected 0 to {highest:g}"
    for x, y in annotation.point_coords or ():
        if not (0 <= x <= size[1] and 0 <= y <= size[0]):
            yield f"its point ({x:g}, {y:g}) is outside the image"
    if (crop := annotation.crop_box) is not None and not (
        min(crop) >= 0 and crop[0] + crop[2] <= size[1] + 1 and crop[1] + crop[3] <= size[0] + 1
    ):
        yield f"its crop_box {list(crop)} is outside the image"


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
