"""One SA-1B-style sample: an image file and its JSON, as bytes, to and from an `ImageRecord`."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
from PIL import Image

from sam_train.data.annotations import decode_annotations
from sam_train.ops import rle
from sam_train.ops.quiet import quiet
from sam_train.structures import Annotation, ImageRecord

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
MOST_PIXELS = 2**31
STRIP_PX = 2**24


class ParsedSample(NamedTuple):
    """A sample's files, its JSON parsed but not its annotations.

    Attributes:
        suffix: the image's.
        size: (H, W) as the JSON states it.
        entries: the JSON's annotations.
    """

    suffix: str
    size: tuple[int, int]
    entries: list[Any]


def parse_sample(files: Mapping[str, bytes]) -> ParsedSample:
    """Finds image and JSON among a sample's files by suffix, and parses the latter.

    Raises:
        ValueError: says what is wrong with the sample.
    """
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in files), None)
    if suffix is None or "json" not in files:
        missing = ".json" if suffix else "image (.jpg or .png)"
        raise ValueError(f"it has no {missing}, only {sorted(files)}")
    try:
        content = _parse(files["json"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its JSON does not parse: {error}") from None
    size = _size(content)
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise ValueError("its JSON has no list `annotations`")
    return ParsedSample(suffix, size, annotations)


def _parse(data: bytes) -> Any:
    """JSON by the quicker parser, or where that refuses it by Python's, which takes NaN and more."""
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return json.loads(data)


def decode_record(key: str, files: Mapping[str, bytes], source: str = "") -> ImageRecord:
    """Reads a sample's JSON; its pixels are decoded when first looked at.

    Args:
        key: names the sample.
        files: its files by suffix, "json" and one of `IMAGE_SUFFIXES`.
        source: the data set's name.

    Raises:
        ValueError: says what is wrong with the sample.
    """
    suffix, size, entries = parse_sample(files)
    return ImageRecord(
        key=key,
        size=size,
        annotations=decode_annotations(entries, size),
        load=partial(decode_image, files[suffix], size),
        load_reduced=partial(decode_reduced, files[suffix], size),
        source=source,
        read_file=partial(_itself, files[suffix]),
    )


def decode_image(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """An image file's (H, W, 3) uint8 RGB pixels, which must have the (H, W) the JSON states.

    An orientation tag is not followed, as masks are drawn on the pixels as they lie in the file. Pixels of
    more than 8 bits are stretched from the darkest to the brightest.

    Raises:
        ValueError: says what is wrong with the image; one of another size is not decoded at all.
    """
    image = decode_reduced(data, size, 1)[0]
    if image.width * image.height <= STRIP_PX:
        return np.asarray(image)
    # Strip by strip: Pillow would hand a large one out by way of two more copies of it.
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP_PX // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    pixels.setflags(write=False)
    return pixels


def decode_reduced(data: bytes, size: tuple[int, int], shrink: int) -> tuple[Image.Image, int]:
    """The same as a picture of Pillow's, at a half, a quarter or an eighth of the size, where the file is a JPEG.

    The finer waves of each block are left out; no full picture is made.

    Args:
        data: the file.
        size: (H, W).
        shrink: 1, 2, 4 or 8, as for `ImageRecord.load_reduced`; at most the shorter side.

    Returns:
        H / n x W / n RGB pixels, rounded up, and n: `shrink`, or 1 for what is no JPEG.

    Raises:
        ValueError: says what is wrong with the image.
    """
    try:
        with quiet_pillow(), Image.open(io.BytesIO(data)) as image:
            if (image.height, image.width) != tuple(size):
                raise _AnotherSizeError(
                    f"its image is {image.height} x {image.width} pixels (height x width), "
                    f"its JSON says {size[0]} x {size[1]}"
                )
            if shrink > 1:
                image.draft("RGB", (size[1] // shrink, size[0] // shrink))
            reduced = shrink if image.size != (size[1], size[0]) else 1
            return _rgb(image), reduced
    except _AnotherSizeError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"its image is refused as too large: {error}") from None
    # A damaged file makes Pillow's readers raise nearly anything.
    except (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError) as error:
        raise ValueError(f"its image cannot be decoded: {error}") from None
    except struct.error as error:
        raise ValueError(f"its image cannot be decoded: {error}") from None


class _AnotherSizeError(ValueError):
    """An image whose header states another size than its JSON."""


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keeps Pillow's warnings back: of images that are large, which their JSON says as well, and of tags."""
    with quiet(module=r"PIL\b"), quiet(Image.DecompressionBombWarning):
        yield


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("it holds pixels that are no numbers")
    low, high = pixels.min(), pixels.max()
    grey = np.rint((pixels - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _itself(data: bytes) -> bytes:
    return data


def encode_record(
    record: ImageRecord,
    *,
    image_id: int = 0,
    image_bytes: bytes | None = None,
    suffix: str = "jpg",
    quality: int = 95,
) -> dict[str, bytes]:
    """The files of a sample by suffix; with "__key__" added they are what webdataset's writer takes.

    Args:
        record: what to write; an optional field that is None is left out of the JSON.
        image_id: SA-1B's number of the image.
        image_bytes: the image file itself, to be kept as it is instead of encoded anew.
        suffix: "jpg" or "png", the image's format.
        quality: of a JPEG; 95 and no chroma subsampling keep thin borders.
    """
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"suffix is one of {IMAGE_SUFFIXES}, got {suffix!r}")
    content = json_content(record, image_id=image_id, file_name=f"{record.key}.{suffix}")
    if image_bytes is None:
        image_bytes = _encode_image(record.image, suffix, quality)
    return {suffix: image_bytes, "json": json.dumps(content, separators=(",", ":")).encode()}


def json_content(record: ImageRecord, *, image_id: int, file_name: str) -> dict[str, Any]:
    """What a sample's JSON holds, as plain values.

    Args:
        record: what to write; an optional field that is None is left out.
        image_id: SA-1B's number of the image.
        file_name: of the image.
    """
    height, width = record.size
    return {
        "image": {
            "image_id": image_id,
            "width": width,
            "height": height,
            "file_name": file_name,
        },
        "annotations": [_entry(annotation) for annotation in record.annotations],
    }


def _encode_image(pixels: np.ndarray, suffix: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    if suffix == "png":
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _size(content: Any) -> tuple[int, int]:
    image = content.get("image") if isinstance(content, dict) else None
    if not isinstance(image, dict):
        raise ValueError("its JSON has no object `image`")
    height, width = image.get("height"), image.get("width")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ValueError(
            f"its JSON gives the image no size: height {height!r}, width {width!r}, "
            "expected two positive integers"
        )
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"its JSON says {height} x {width} pixels (height x width), more than run lengths count"
        )
    return height, width


def _entry(annotation: Annotation) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": annotation.id,
        "segmentation": rle.compress(annotation.rle),
        "bbox": list(annotation.bbox),
        "area": int(annotation.area),
        "predicted_iou": annotation.predicted_iou,
        "stability_score": annotation.stability_score,
        "point_coords": annotation.point_coords,
        "crop_box": annotation.crop_box,
    }
    return {name: value for name, value in entry.items() if value is not None} | dict(
        annotation.extra
    )
