"""`sam-segment`: a user's images to SA-1B JSON and pictures; run again, it goes on where it stopped."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from sam_train.data.file_lists import files_below
from sam_train.data.image_files import SUFFIXES, TooLargeError, read_large_image
from sam_train.data.shards import json_content
from sam_train.data.source import DamagedSampleError, DamageTally
from sam_train.inference.inputs import InputError
from sam_train.inference.overlays import draw_annotations
from sam_train.ops.drawing import save_image
from sam_train.ops.files import write_atomically
from sam_train.structures import Annotation, ImageRecord

log = logging.getLogger(__name__)

MADE_WITH = "sam_segment"
"""The key of a JSON that says how it was made; other readers of SA-1B pass it over."""


class Segmenter(Protocol):
    """What finds the masks of an image."""

    def segment(self, image: np.ndarray) -> list[Annotation]:
        """Segments an (H, W, 3) uint8 RGB image. An InputError is about the prompts, and ends the run."""
        ...


class Segmented(NamedTuple):
    """What a run did.

    Attributes:
        num_images: segmented now.
        num_masks: in them.
        num_empty: of these without a pixel, which are left out.
        num_before: images that were finished already.
        broken: names of those that cannot be read.
        out: where all is.
    """

    num_images: int
    num_masks: int
    num_empty: int
    num_before: int
    broken: list[str]
    out: Path

    def __str__(self) -> str:
        parts = [f"{self.num_images} images, {self.num_masks} masks"]
        if self.num_empty:
            parts.append(f"{self.num_empty} answers were empty and are left out")
        if self.num_before:
            parts.append(f"{self.num_before} images were done before")
        if self.broken:
            parts.append(f"{len(self.broken)} cannot be read: {', '.join(self.broken)}")
        return f"{'; '.join(parts)}\nSee {self.out}/masks and {self.out}/overlays"


@dataclass(frozen=True, kw_only=True)
class SegmentFiles:
    """Segments image files.

    Attributes:
        images: a file, a folder (looked through at any depth) or a glob.
        out: gets `masks/NAME.json` and `overlays/NAME.jpg`, in the folders the images are in.
        max_bad_fraction: of images that may be broken; each is named.
        overlay_px: longest side of the pictures; 0 makes none.
        max_pixels: of an image; one of more ends the run with its name.
    """

    images: str
    out: Path
    max_bad_fraction: float = 0.05
    overlay_px: int = 1600
    max_pixels: int = 1_000_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1 or self.overlay_px < 0:
            raise ValueError(
                "expected max_bad_fraction in [0, 1] and overlay_px of 0 or more, got "
                f"{self.max_bad_fraction} and {self.overlay_px}"
            )
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels is 1 or more, got {self.max_pixels}")

    def run(self, segmenter: Segmenter, made_with: Mapping[str, Any]) -> Segmented:
        """Segments what is not finished.

        Args:
            segmenter: finds the masks.
            made_with: what decides the answers, `model` and `mode`, as plain values; an image finished
                with the same is not done again.

        Raises:
            FileNotFoundError: there are no images.
            UnusableSourceError: too many are broken.
            InputError: a prompt does not fit an image.
            TooLargeError: an image has more than `max_pixels`.
            ValueError: the place of a result is taken.
        """
        names = self.find()
        tally = DamageTally(self.images, self.max_bad_fraction)
        num_images = num_masks = num_empty = num_before = 0
        with tqdm(names.items(), unit=" images", desc="segment", dynamic_ncols=True) as bar:
            for key, path in bar:
                tally.seen += 1
                record = json.loads(json.dumps({**made_with, "image": _digest(path)}))
                if self._is_done(key, record):
                    num_before += 1
                    continue
                try:
                    image = _read(path, self.max_pixels, tally)
                except DamagedSampleError:  # counted and logged already
                    continue
                found = _segment(segmenter, image, path)
                kept = [annotation for annotation in found if annotation.area > 0]
                self._write(key, path, image, kept, record)
                num_images, num_masks = num_images + 1, num_masks + len(kept)
                num_empty += len(found) - len(kept)
                bar.set_postfix_str(f"{num_masks} masks", refresh=False)
        tally.finish()
        return Segmented(num_images, num_masks, num_empty, num_before, tally.names, self.out)

    def find(self) -> dict[str, Path]:
        """The images by what their results are called, in a fixed order.

        Raises:
            FileNotFoundError: there is none.
            ValueError: two would share a result.
        """
        if Path(self.images).is_file():
            paths = [Path(self.images)]
            root = paths[0].parent
        else:
            folder, found = files_below(self.images, SUFFIXES)
            root, out = Path(folder), self.out.resolve()
            paths = [root / name for name in found]
            # Its own pictures, where it writes below the images, are none of them.
            paths = [path for path in paths if out not in path.resolve().parents]
        if not paths:
            raise FileNotFoundError(f"{self.images}: no images ({', '.join(sorted(SUFFIXES))})")
        names: dict[str, Path] = {}
        for path in paths:
            key = str(path.relative_to(root).with_suffix(""))
            if key in names:
                raise ValueError(
                    f"{names[key]} and {path} would both be written to {key}.json: rename one"
                )
            names[key] = path
        return names

    def _place(self, key: str) -> Path:
        return self.out / "masks" / f"{key}.json"

    def _picture(self, key: str) -> Path:
        return self.out / "overlays" / f"{key}.jpg"

    def _is_done(self, key: str, record: dict[str, Any]) -> bool:
        place = self._place(key)
        if not place.exists():
            return False
        try:
            before = json.loads(place.read_text(encoding="utf-8")).get(MADE_WITH)
        except (OSError, ValueError, AttributeError):
            before = None
        if not isinstance(before, dict):
            raise ValueError(
                f"{place} is there and not from sam-segment: choose another out=DIR, or move it"
            )
        names = sorted(before.keys() | record.keys() - {"checkpoint"})
        changed = [n for n in names if n != "checkpoint" and before.get(n) != record.get(n)]
        if changed:
            log.warning("%s was made with another %s: done anew", place, " and ".join(changed))
        elif self.overlay_px and not self._picture(key).exists():
            log.warning("%s has no picture in %s: done anew", place, self.out / "overlays")
            return False
        return not changed

    def _write(
        self,
        key: str,
        path: Path,
        image: np.ndarray,
        annotations: list[Annotation],
        record: dict[str, Any],
    ) -> None:
        """The picture, then the JSON: an image counts as finished once that is there."""
        if self.overlay_px:
            picture = draw_annotations(image, annotations, longest_px=self.overlay_px)
            save_image(self._picture(key), picture)
        size = (image.shape[0], image.shape[1])
        sample = ImageRecord(key, size, tuple(annotations), lambda: image)
        content = json_content(sample, image_id=zlib.crc32(os.fsencode(key)), file_name=path.name)
        text = json.dumps({**content, MADE_WITH: record}, separators=(",", ":"))
        place = self._place(key)
        for unfinished in place.parent.glob(f".{glob.escape(place.name)}.*"):
            unfinished.unlink(missing_ok=True)  # of a run that was killed while it wrote
        write_atomically(place, text)


def _digest(path: Path) -> str | None:
    """Of the file's bytes: an edited image may keep its length."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError:
        return None  # reading it will say why


def _read(path: Path, max_pixels: int, tally: DamageTally) -> np.ndarray:
    try:
        return read_large_image(path, max_pixels)
    except TooLargeError:  # which is for the user to decide, and no damage
        raise
    except (ValueError, OSError) as error:
        raise tally.damaged(str(path), error) from None


def _segment(segmenter: Segmenter, image: np.ndarray, path: Path) -> list[Annotation]:
    try:
        return segmenter.segment(image)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
