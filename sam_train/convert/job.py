"""`sam-convert data=NAME out=DIR`: any source to SA-1B shards, by several processes, going on after a kill.

out/convert.json     what is being converted, and how; written when the data was found
out/.parts/          finished shards, and what is known of each, until all are there
out/train-000000.tar the shards, and val-000000.tar
out/manifest.json    their counts and checksums; written last: it marks the conversion as finished
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam_train.convert import pool
from sam_train.convert.sample import ShardSettings
from sam_train.convert.unit import (
    Job,
    Part,
    Progress,
    Unit,
    finished_parts,
    part_path,
)
from sam_train.convert.units import count_units, fingerprint, kept_share, tolerant
from sam_train.data.datamodule import hold_out
from sam_train.data.source import DamageTally, Source, UnusableSourceError
from sam_train.ops.files import write_atomically
from sam_train.training.run_folder import differences

log = logging.getLogger(__name__)

CONFIG, MANIFEST, PARTS, LOCK = "convert.json", "manifest.json", ".parts", ".lock"


@dataclass
class _Tally:
    """What was left out, and how many images were not.

    Attributes:
        kept_share: of the images read for "train" that are its own; where that is less than 1, "val" is
            read from the same files and meets the same damage.
        damaged: how often each name came with each reason, by split.
        keys: of the images, by split.
    """

    kept_share: float = 1
    num_images: int = 0
    num_small: int = 0
    num_empty: int = 0
    damaged: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    keys: dict[str, set[str]] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        known = self.keys.setdefault(part.split, set())
        _check_keys(Counter(part.keys) + Counter(known.intersection(part.keys)))
        known.update(part.keys)
        self.num_images += len(part.keys)
        self.num_small += part.num_small
        self.num_empty += part.num_empty
        found = [(name, reason) for name, reason in part.damaged]
        self.damaged.setdefault(part.split, Counter()).update(found)

    def all_damaged(self) -> list[tuple[str, str]]:
        """Names and reasons, sorted; what two splits met in the same files counts once."""
        total: Counter[tuple[str, str]] = Counter()
        for counts in self.damaged.values():
            total = total | counts if self.kept_share < 1 else total + counts
        return sorted(total.elements())

    def left_out(self) -> dict[str, Any]:
        return {
            "small_masks": self.num_small,
            "images_without_masks": self.num_empty,
            "damaged": [{"name": name, "reason": reason} for name, reason in self.all_damaged()],
        }


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion of one data set.

    Attributes:
        splits: the sources, by "train" and "val"; no image is in both.
        out: the folder of shards.
        settings: of the shards.
        config: what else decides on the result, to tell another conversion from this one.
        max_bad_fraction: of images that may be damaged.
    """

    splits: Mapping[str, Source]
    out: Path
    settings: ShardSettings
    config: Mapping[str, Any]
    max_bad_fraction: float = 0.05
    _progress: _Tally = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_progress", _Tally(kept_share(self.splits["train"])))

    def run(self, num_workers: int) -> dict[str, Any]:
        """Converts what is missing, and returns the manifest.

        Raises:
            ValueError: the folder holds something else, or too many images are damaged.
        """
        finished = self._look_at_folder()
        if finished is None:
            pieces = self._pieces()  # before anything is written: they may not be found
            (self.out / PARTS).mkdir(parents=True, exist_ok=True)
            with _locked(self.out / PARTS / LOCK):
                finished = self._look_at_folder() or self._run_locked(pieces, num_workers)
        shutil.rmtree(self.out / PARTS, ignore_errors=True)
        return finished

    def _run_locked(self, pieces: Mapping[str, int], num_workers: int) -> dict[str, Any]:
        names = (f"{PARTS}/.*.unfinished", f"{PARTS}/.*.json.*", f".{CONFIG}.*", f".{MANIFEST}.*")
        for leftover in (path for name in names for path in self.out.glob(name)):
            leftover.unlink()
        if not self._is_begun():
            for part in self.out.glob(f"{PARTS}/*.json"):
                part.unlink()
        write_atomically(self.out / CONFIG, partial(_dump, self._plain_config()))
        units = self._units(pieces)
        self._convert(units, num_workers)
        return self._put_in_place(units)

    def _look_at_folder(self) -> dict[str, Any] | None:
        """Sees that the folder is this conversion's or free; returns the manifest if that is finished.

        What was begun with another configuration and has no shard yet is free: it was a mistake.
        """
        path, manifest = self.out / CONFIG, self.out / MANIFEST
        if not path.is_file():
            if self.out.is_dir() and any(not p.name.startswith(".") for p in self.out.iterdir()):
                raise ValueError(f"{self.out} holds files already; choose another out=DIR")
            return None
        changes = differences(json.loads(path.read_text()), self._plain_config())
        if changes and (self._is_begun() or manifest.is_file()):
            lines = "\n".join(f"  {line}" for line in changes[:20])
            raise ValueError(
                f"{self.out} holds another conversion:\n{lines}\n"
                "Choose another out=DIR, or delete the folder"
            )
        return json.loads(manifest.read_text()) if manifest.is_file() else None

    def _plain_config(self) -> Any:
        return json.loads(json.dumps(self.config, default=str))

    def _is_begun(self) -> bool:
        """Whether there is a finished shard."""
        return any(any(self.out.glob(name)) for name in ("*.tar", f"{PARTS}/*.tar"))

    def _pieces(self) -> dict[str, int]:
        """In how many pieces each split is converted."""
        return {
            split: count_units(source, self.settings.images_per_shard)
            for split, source in self.splits.items()
        }

    def _units(self, counts: Mapping[str, int]) -> list[Unit]:
        # The data itself is part of what is converted: with other files, units are others.
        path = self.out / PARTS / "units.json"
        data = {
            split: {"pieces": counts[split], "files": fingerprint(source)}
            for split, source in self.splits.items()
        }
        if path.is_file() and json.loads(path.read_text()) != data:
            raise ValueError(
                "the data has changed since this conversion was begun: it has other files, or more or "
                f"fewer; choose another out=DIR, or delete {self.out}"
            )
        write_atomically(path, partial(_dump, data))
        units, first = [], 0
        for split, count in counts.items():
            units += [Unit(split, number, count, first) for number in range(count)]
            first += count
        return units

    def _convert(self, units: Sequence[Unit], num_workers: int) -> None:
        folder = self.out / PARTS
        done = {unit: finished_parts(folder, unit) for unit in units}
        for parts in done.values():
            for part in parts:
                self._progress.add(part)
        if self._progress.num_images:
            log.info("going on: %d images are there already", self._progress.num_images)
        missing = [unit for unit, parts in done.items() if not (parts and parts[-1].is_last)]
        job = Job(
            {split: tolerant(one) for split, one in self.splits.items()}, folder, self.settings
        )
        judge = _Judge(self.max_bad_fraction, self._progress)
        news: Iterator[Progress] = pool.run(job, missing, min(num_workers, len(missing)))
        bar = tqdm(unit=" images", disable=not sys.stderr.isatty(), initial=judge.num_met)
        with bar:
            for progress in news:
                bar.update(progress.num_images)
                if progress.part is not None:
                    judge.add(progress.part)
        judge.finish()

    def _put_in_place(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Gives finished shards their names, in the order of the units, and writes the manifest."""
        folder = self.out / PARTS
        splits: dict[str, Any] = {}
        moves: list[tuple[Path, Path]] = []
        for split in self.splits:
            shards: list[dict[str, Any]] = []
            keys: Counter[str] = Counter()
            for unit in (unit for unit in units if unit.split == split):
                parts = finished_parts(folder, unit)
                assert parts and parts[-1].is_last
                for number, part in enumerate(parts):
                    if not part.keys:
                        continue
                    name = f"{split}-{len(shards):06d}.tar"
                    moves.append((part_path(folder, unit, number, "tar"), self.out / name))
                    shards.append(_entry(name, part))
                    keys.update(part.keys)
            _check_keys(keys)
            splits[split] = {
                "images": len(keys),
                "masks": sum(shard["masks"] for shard in shards),
                "shards": shards,
            }
        if not any(split["images"] for split in splits.values()):
            raise ValueError("there is no image with a mask in this data, so there is no shard")
        for old, new in moves:
            if old.is_file():  # else an earlier run got so far
                old.replace(new)
        manifest = {"splits": splits} | self._progress.left_out()
        write_atomically(self.out / MANIFEST, partial(_dump, manifest))
        return manifest


def conversion(
    train: Source,
    val: Source | None,
    *,
    out: Path,
    settings: ShardSettings,
    config: Mapping[str, Any],
    max_bad_fraction: float,
    val_share: float,
) -> Conversion:
    """A conversion of a data set's two splits; where both are the same images, a share becomes `val`."""
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share is in [0, 1), got {val_share}")
    splits = {"train": train}
    if val is not None and val != train:
        splits = dict(zip(("train", "val"), hold_out(train, val, val_share), strict=True))
    elif val is not None and val_share:
        splits = dict(zip(("train", "val"), hold_out(train, train, val_share), strict=True))
    return Conversion(
        splits=splits,
        out=out,
        settings=settings,
        config=config,
        max_bad_fraction=max_bad_fraction,
    )


def summary(manifest: Mapping[str, Any], out: Path) -> str:
    """The manifest in a few lines."""
    lines = [
        f"{split}: {content['images']} images, {content['masks']} masks in "
        f"{len(content['shards'])} shards, {sum(s['bytes'] for s in content['shards']) / 2**20:.1f} MiB"
        for split, content in manifest["splits"].items()
    ]
    damaged = manifest["damaged"]
    lines.append(
        f"left out: {len(damaged)} damaged images, {manifest['images_without_masks']} without a mask, "
        f"{manifest['small_masks']} masks below min_area"
    )
    lines += [f"  {one['name']}: {one['reason']}" for one in damaged[:10]]
    if len(damaged) > 10:
        lines.append(f"  and {len(damaged) - 10} more, in manifest.json")
    return "\n".join([*lines, f"See {out / MANIFEST}; sam-convert check={out} verifies it"])


class _Judge:
    """Says what is damaged, and ends the conversion when it is too much."""

    def __init__(self, max_bad_fraction: float, tally: _Tally) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is in [0, 1], got {max_bad_fraction}")
        self.max_bad_fraction = max_bad_fraction
        self.tally = tally
        self.damaged = tally.all_damaged()

    @property
    def num_met(self) -> int:
        """Images that are in one of the splits, or damaged."""
        return self.tally.num_images + self.tally.num_empty + len(self.damaged)

    def add(self, part: Part) -> None:
        before = Counter(self.damaged)
        self.tally.add(part)
        if part.damaged:
            self.damaged = self.tally.all_damaged()
            for name, reason in (Counter(self.damaged) - before).elements():
                log.warning("%s is damaged and left out: %s", name, reason)
        # Until "val" has been read, its images are not met, but what is damaged among them is.
        self._check(max(self.num_met / self.tally.kept_share, DamageTally.GRACE))

    def finish(self) -> None:
        self._check(self.num_met)

    def _check(self, num_met: float) -> None:
        if len(self.damaged) > self.max_bad_fraction * num_met:
            names = [name for name, _ in self.damaged]
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UnusableSourceError(
                f"{len(names)} of {self.num_met} images are damaged ({shown}), more than "
                f"max_bad_fraction={self.max_bad_fraction} allows; each is named with its reason in the "
                "log. Mend the data, or raise max_bad_fraction and start again: what is done is kept"
            )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another sam-convert is writing to {path.parent.parent}; wait for it, or stop it"
            ) from None
        yield


def _entry(name: str, part: Part) -> dict[str, Any]:
    return {
        "name": name,
        "images": len(part.keys),
        "masks": part.num_masks,
        "bytes": part.num_bytes,
        "sha256": part.sha256,
    }


def _check_keys(keys: Counter[str]) -> None:
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(
            f"{len(twice)} names are those of several images ({', '.join(twice[:5])}): with "
            "keys=numbered each image gets one of its own; choose another out=DIR for it"
        )


def _dump(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
