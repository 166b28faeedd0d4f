"""Registers images by what is in their files, and reads them where they lie."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Protocol

import numpy as np
from sqlalchemy.exc import IntegrityError
from tqdm import tqdm

from data_engine.image_finding import Found, read_url
from data_engine.mask_store.rows import chunks
from data_engine.mask_store.store import Store
from data_engine.records import Image
from sam_train.data.image_files import header_size
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import decode_image, decode_reduced
from sam_train.data.tar_samples import local_path, read_samples

log = logging.getLogger(__name__)

CHUNK = 256
MOST_SHRINK = 8
ATTEMPTS = 10
COPIES = "image_copies"
"""Folder of an engine: `HASH/NAME.jpg`, byte for byte, and `HASH/NAME.json` with the masks that are known of it."""
DIGITS = 16
"""Of a hash in the name of a folder."""
ADVICE = "put it back, or register the images again where they now are"


class ImageGoneError(OSError):
    """An image is not where it was registered any more; the message says which, and what to do."""


@dataclass(kw_only=True)
class Registration:
    """What came of registering images.

    Attributes:
        num_new, num_known: registered now, and before.
        moved: now found elsewhere, as their old place is empty.
        duplicates: name and the key of the image that it equals, byte for byte.
        broken: name and what is wrong; these are not registered.
        taken_down: names of images that a person had taken down; not registered either.
    """

    num_new: int = 0
    num_known: int = 0
    moved: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    taken_down: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {
            "new": self.num_new,
            "known": self.num_known,
            "moved": len(self.moved),
            "duplicate": len(self.duplicates),
            "broken": len(self.broken),
            "taken down before": len(self.taken_down),
        }
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no image"


class Copying(Protocol):
    """`data_engine.image_copies.Copies`."""

    def has(self, image: Image) -> bool:
        """Whether an image is registered as a copy that is there."""
        ...

    def keep(self, image: Image) -> Image:
        """Copies an image from where it is, and returns it as it is to be registered."""
        ...


def register(
    store: Store,
    found: Iterable[Found],
    *,
    held_out: float = 0.0,
    copies: Copying | None = None,
    num_threads: int = 4,
    clock: Callable[[], float] = time.time,
) -> Registration:
    """Registers images; what is known, equal to another, broken or was taken down is named and left out.

    Each is read to its last pixel, and those that are copied again. What was registered before a crash
    stays so.

    Args:
        found: as `find_images` gives them.
        held_out: share of them to keep for measuring, in [0, 1]. An image's hash decides, so the choice
            is the same each time and on every machine.
        copies: keeps copies, which are then what is registered; None copies nothing.
        num_threads: that read and decode.
        clock: seconds since 1970.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out is a share in [0, 1], got {held_out}")
    result = Registration()
    done = tqdm(_examined(found, num_threads), unit=" images", desc="register", dynamic_ncols=True)
    for chunk in chunks(done, CHUNK):
        _register_chunk(store, chunk, held_out, copies, clock(), result)
    log.info("registered in %s: %s", store.name, result)
    return result


@dataclass(frozen=True)
class _Examined:
    """A file's hash and (H, W), or what is wrong with it."""

    found: Found
    image_id: str = ""
    size: tuple[int, int] = (0, 0)
    broken: str = ""


def _examined(found: Iterable[Found], num_threads: int) -> Iterator[_Examined]:
    """Reads and decodes some images ahead, in order."""
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[_Examined]] = deque()
        try:
            for one in found:
                ahead.append(pool.submit(_examine, one))
                if len(ahead) > 2 * num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _examine(found: Found) -> _Examined:
    try:
        data = found.read()
        size = header_size(io.BytesIO(data))
        shrink = next(n for n in (MOST_SHRINK, 4, 2, 1) if n <= min(size))
        # A reduced JPEG is decoded to its end all the same, at a fraction of the time.
        decode_reduced(data, size, shrink)
        os.fsdecode(found.path).encode()
    except UnicodeEncodeError:
        return _Examined(found, broken="its name is no UTF-8, so no database takes it; rename it")
    except OSError as error:
        return _Examined(found, broken=f"it cannot be read: {error.strerror or error}")
    except ValueError as error:
        return _Examined(found, broken=str(error))
    return _Examined(found, hashlib.sha256(data).hexdigest(), size)


def _register_chunk(
    store: Store,
    chunk: list[_Examined],
    held_out: float,
    copies: Copying | None,
    now: float,
    result: Registration,
) -> None:
    whole = [one for one in chunk if not one.broken]
    for one in chunk:
        if one.broken:
            log.warning("%s is left out: %s", one.found.name, one.broken)
            result.broken.append((one.found.name, one.broken))
    ids = [one.image_id for one in whole]
    known, gone = store.images_by_id(ids), store.taken_down(ids)
    new: dict[str, tuple[_Examined, Image]] = {}
    twins: list[_Examined] = []
    for one in whole:
        other = known.get(one.image_id)
        if one.image_id in gone:
            log.warning("%s was taken down and is left out", one.found.name)
            result.taken_down.append(one.found.name)
        elif other is not None:
            if held_out == 1 and not other.held_out:
                log.warning("%s is not held out: it was registered to be labelled", one.found.name)
            known[one.image_id] = _meet_again(store, one, other, copies, result)
        elif one.image_id in new:
            twins.append(one)
        elif (placed := _placed(one, copies, result)) is not None:
            new[one.image_id] = placed
    num_new, keys = _add_named(store, list(new.values()), held_out, now)
    result.num_new += num_new
    for one in twins:
        _note_duplicate(one, keys[one.image_id], result)


def _placed(
    one: _Examined, copies: Copying | None, result: Registration
) -> tuple[_Examined, Image] | None:
    """An image as it is to be registered, without its name: where it lies, or its copy; None where it cannot be copied."""
    image = _image(one)
    try:
        return one, image if copies is None else copies.keep(image)
    except ImageGoneError as error:
        log.warning("%s is left out: %s", one.found.name, error)
        result.broken.append((one.found.name, str(error)))
        return None


def _add_named(
    store: Store, new: list[tuple[_Examined, Image]], held_out: float, now: float
) -> tuple[int, dict[str, str]]:
    """Adds images by names that are free; others that register at this moment may take one.

    Returns:
        How many are new, and the name of each by its hash.
    """
    for attempt in range(ATTEMPTS):
        keys = {key for one, _ in new for key in _keys(one)}
        taken = {key: image.id for key, image in store.images_by_key(sorted(keys)).items()}
        images = []
        for one, image in new:
            key = next(key for key in _keys(one) if taken.get(key, image.id) == image.id)
            taken[key] = image.id
            is_held_out = int(image.id[:8], 16) < held_out * 2**32
            images.append(replace(image, key=key, held_out=is_held_out, created_at=now))
        try:
            return store.add_images(images), {image.id: image.key for image in images}
        except IntegrityError:
            if attempt + 1 == ATTEMPTS:
                raise
    raise AssertionError


def _note_duplicate(one: _Examined, key: str, result: Registration) -> None:
    log.warning("%s is left out: it equals %s", one.found.name, key)
    result.duplicates.append((one.found.name, key))


def _keys(one: _Examined) -> tuple[str, str]:
    """Names for an image in shards, the better first; the second is its own whatever others are called."""
    stem = os.path.splitext(os.path.basename(one.found.member or one.found.path))[0]
    plain = re.sub(r"[^\w-]+", "_", stem) or "image"
    return plain, f"{plain}-{one.image_id[:16]}"


def _image(one: _Examined) -> Image:
    """Without a name yet."""
    height, width = one.size
    return Image(
        id=one.image_id,
        key="",
        width=width,
        height=height,
        path=one.found.path,
        member=one.found.member,
        offset=one.found.offset,
    )


def _meet_again(
    store: Store, one: _Examined, other: Image, copies: Copying | None, result: Registration
) -> Image:
    """The same bytes as an image that is registered: the same file, a copy, or it was moved.

    Returns:
        The image as it is now registered.
    """
    here = replace(other, path=one.found.path, member=one.found.member, offset=one.found.offset)
    path = local_path(other.path)
    is_there = path is None or os.path.exists(path)
    if copies is not None and not copies.has(other):
        if (placed := _placed(one, copies, result)) is None:
            return other
        own = placed[1]
        other = replace(other, path=own.path, member=own.member, offset=own.offset)
        store.put_image(other)
        result.num_known += 1
    elif here == other or (is_there and is_copy(other)):
        result.num_known += 1
    elif not is_there or (here.path, here.member) == (other.path, other.member):
        other = here
        store.put_image(other)
        log.info("%s has moved to %s", other.key, one.found.name)
        result.moved.append(one.found.name)
    else:
        _note_duplicate(one, other.key, result)
    return other


def is_copy(image: Image) -> bool:
    """Whether an image is registered as a copy in an engine's folder."""
    *_, folder, own, _ = ("", "", *PurePath(image.path).parts)
    return image.member is None and (folder, own) == (COPIES, image.id[:DIGITS])


def image_bytes(image: Image) -> bytes:
    """The file of an image, as it was when it was registered.

    Raises:
        ImageGoneError: it is gone, cannot be read or has changed.
    """
    try:
        data = _stored_bytes(image)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ImageGoneError(f"{_place(image)} cannot be read ({reason}); {ADVICE}") from None
    if data is None or hashlib.sha256(data).hexdigest() != image.id:
        what = "is not there any more" if data is None else "has changed since it was registered"
        raise ImageGoneError(f"{_place(image)} {what}; {ADVICE}")
    return data


def image_pixels(image: Image) -> np.ndarray:
    """The (H, W, 3) uint8 RGB pixels of an image; raises as `image_bytes` does."""
    return decode_image(image_bytes(image), image.size)


def _stored_bytes(image: Image) -> bytes | None:
    if image.member is None and local_path(image.path) is None:
        return read_url(image.path)
    if image.member is None:
        with open(image.path, "rb") as file:
            return file.read()
    for sample in read_samples(image.path, is_wanted, image.offset or 0):
        for suffix, data in sample.files.items():
            if f"{sample.key}.{suffix}" == image.member:
                return data
        return None
    return None


def _place(image: Image) -> str:
    return image.path if image.member is None else f"{image.member} of {image.path}"
