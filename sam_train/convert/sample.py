"""One record made into the files of a shard's sample: checked, numbered, its masks measured."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from sam_train.data.shards import encode_record
from sam_train.ops import rle
from sam_train.structures import Annotation, ImageRecord

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
"""How image files begin that are kept as they are."""


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What shards are to be like.

    Attributes:
        shard_mb: a shard is closed when its samples take this much, or
        images_per_shard: when it holds so many.
        min_area: masks of fewer pixels are dropped, and counted.
        keep_empty: whether images without a mask are written too.
        image_format: "jpg" or "png", for images that come as neither; others keep their bytes.
        quality: of a JPEG.
        keys: "original" keeps names (what webdataset cannot take in one is replaced, and a checksum
            added), "numbered" gives each image a name of its own.
    """

    shard_mb: float = 256
    images_per_shard: int = 1000
    min_area: int = 1
    keep_empty: bool = False
    image_format: str = "jpg"
    quality: int = 95
    keys: str = "original"

    def __post_init__(self) -> None:
        for name in ("images_per_shard", "min_area", "quality"):
            if type(value := getattr(self, name)) is not int:
                raise ValueError(f"{name} is a whole number, got {value!r}")
        if type(self.shard_mb) not in (int, float) or type(self.keep_empty) is not bool:
            raise ValueError(
                f"shard_mb is a number and keep_empty true or false, got {self.shard_mb!r} and "
                f"{self.keep_empty!r}"
            )
        if self.shard_mb <= 0 or self.images_per_shard < 1:
            raise ValueError(
                f"expected shard_mb > 0 and images_per_shard >= 1, got {self.shard_mb} and "
                f"{self.images_per_shard}"
            )
        if self.image_format not in ("jpg", "png"):
            raise ValueError(f"image_format is jpg or png, got {self.image_format}")
        if self.keys not in ("original", "numbered"):
            raise ValueError(f"keys is original or numbered, got {self.keys}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is in [1, 100], got {self.quality}")


class Sample(NamedTuple):
    """A record's files.

    Attributes:
        files: by suffix; None where the image has no mask left and is not to be kept.
        num_masks: in them.
        num_small: masks that were dropped for their area.
    """

    files: dict[str, bytes] | None
    num_masks: int
    num_small: int


def make_sample(
    record: ImageRecord, key: str, *, image_id: int, first_id: int, settings: ShardSettings
) -> Sample:
    """Decodes a record's pixels and reads every one of its run lengths; encodes what has to be.

    Args:
        record: one image.
        key: its name in the shard.
        image_id: SA-1B's number of it.
        first_id: number of its first mask.
        settings: see there.

    Raises:
        DamagedSampleError: it cannot be read; it was counted.
    """
    annotations: list[Annotation] = []
    for annotation in record.annotations:
        try:
            runs = rle.Runs(annotation.rle)
        except ValueError as error:
            raise record.damaged(f"annotation {annotation.id}: {error}") from None
        if runs.area < settings.min_area:
            continue
        x0, y0, x1, y1 = runs.box()
        annotations.append(
            replace(
                annotation,
                id=first_id + len(annotations),
                bbox=(x0, y0, x1 - x0, y1 - y0),
                area=runs.area,
            )
        )
    record.image  # noqa: B018  decoded even where its bytes are kept, so that damage is found here
    num_small = len(record.annotations) - len(annotations)
    if not annotations and not settings.keep_empty:
        return Sample(None, 0, num_small)
    original = None if record.read_file is None else record.read_file()
    suffix = None if original is None else _kept_suffix(original)
    files = encode_record(
        replace(record, key=key, annotations=tuple(annotations)),
        image_id=image_id,
        image_bytes=original if suffix else None,
        suffix=suffix or settings.image_format,
        quality=settings.quality,
    )
    return Sample(files, len(annotations), num_small)


def safe_key(key: str) -> str:
    """A name that webdataset takes for one sample's: without dots, slashes and the like."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", key)
    if safe == key and len(key) <= 80:
        return key
    return f"{safe[:80]}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"


def _kept_suffix(data: bytes) -> str | None:
    return "jpg" if data.startswith(JPEG) else "png" if data.startswith(PNG) else None
