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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam_train.convert import pool
from sam_train.convert.manifest import MANIFEST, dump, put_in_place
from sam_train.convert.sample import ShardSettings
from sam_train.convert.tally import Judge, Tally
from sam_train.convert.unit import Job, Progress, Unit, finished_parts
from sam_train.convert.units import count_units, fingerprint, kept_share, tolerant
from sam_train.data.source import Source
from sam_train.data.val_choice import hold_out
from sam_train.ops.files import write_atomically
from sam_train.training.run_folder import differences

log = logging.getLogger(__name__)

CONFIG, PARTS, LOCK = "convert.json", ".parts", ".lock"


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
    _progress: Tally = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_progress", Tally(kept_share(self.splits["train"])))

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
        write_atomically(self.out / CONFIG, partial(dump, self._plain_config()))
        units = self._units(pieces)
        self._convert(units, num_workers)
        return put_in_place(units, self.out / PARTS, self.out, self._progress.left_out())

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
        write_atomically(path, partial(dump, data))
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
        judge = Judge(self.max_bad_fraction, self._progress)
        news: Iterator[Progress] = pool.run(job, missing, min(num_workers, len(missing)))
        bar = tqdm(unit=" images", disable=not sys.stderr.isatty(), initial=judge.num_met)
        with bar:
            for progress in news:
                bar.update(progress.num_images)
                if progress.part is not None:
                    judge.add(progress.part)
        judge.finish()


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
