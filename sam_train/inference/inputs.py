"""What users hand to a predictor, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from sam_train.structures import BOX_BOTTOM_RIGHT, PADDING

RGB, BGR = "RGB", "BGR"


class InputError(AssertionError, ValueError):
    """An image or a prompt that cannot be taken: the message says why and what to do.

    An AssertionError because segment_anything raises that, a ValueError because it is one.
    """


def read_pixels(image: Any, *, in_chans: int = 3) -> np.ndarray:
    """An image as the uint8 pixels that a model takes.

    The rules, for models of three channels:
        grey, (H, W) or (H, W, 1): repeated three times.
        alpha, (H, W, 2) or (H, W, 4): dropped; the colours under it count, as when a file is read.
        uint8, and other integers from 0 to 255: as they are.
        uint16: stretched from the darkest to the brightest value, as when a file is read.
        floats: from 0 to 1, times 255.
    Everything else is refused. Models of another number of channels take (H, W) for one, and exactly
    their own number else.

    Args:
        image: array as above, or a PIL image.
        in_chans: channels of the model.

    Returns:
        (H, W, in_chans) uint8, channels in the order they came in.

    Raises:
        InputError: the image is not one of these.
    """
    if isinstance(image, Image.Image):
        image = _from_pillow(image, in_chans)
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"expected an image as a NumPy array (H, W, 3) or a PIL image, got {type(image).__name__}; "
            "a tensor that is resized already is for set_torch_image"
        )
    return _to_uint8(_to_channels(image, in_chans))


def _from_pillow(image: Image.Image, in_chans: int) -> np.ndarray:
    is_wide = image.mode.startswith(("I", "F"))
    if is_wide or in_chans != 3:
        return np.asarray(image)
    return np.asarray(image.convert("RGB"))


def _to_channels(image: np.ndarray, in_chans: int) -> np.ndarray:
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or not pixels.size:
        raise InputError(f"expected an image (H, W, 3) with pixels, got shape {image.shape}")
    channels = pixels.shape[2]
    if channels == in_chans:
        return pixels
    if in_chans == 3 and channels in (1, 2):
        return np.repeat(pixels[..., :1], 3, axis=2)
    if in_chans == 3 and channels == 4:
        return pixels[..., :3]
    is_turned = pixels.shape[0] in (1, 3, 4) and channels > 4
    hint = "; transpose(1, 2, 0) puts the channels last" if is_turned else ""
    more = " (grey and alpha are taken, too)" if in_chans == 3 else ""
    raise InputError(
        f"expected an image of {in_chans} channels, (H, W, {in_chans}){more}, got shape {image.shape}{hint}"
    )


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "iuf":
        raise InputError(f"expected an image of uint8, uint16 or floats, got {pixels.dtype}")
    low, high = pixels.min(), pixels.max()
    if pixels.dtype == np.uint16:
        scale = 255 / max(float(high) - float(low), 1e-12)
        return np.rint((pixels.astype(np.float64) - low) * scale).astype(np.uint8)
    if pixels.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise InputError(
                f"expected a float image with values from 0 to 1, got {low:g} to {high:g}: scale it, or "
                "make it uint8"
            )
        return np.rint(pixels * 255).astype(np.uint8)
    if low < 0 or high > 255:
        raise InputError(
            f"expected integers from 0 to 255, got {low} to {high} as {pixels.dtype}: astype(np.uint16) "
            "lets them be stretched, or scale them to uint8"
        )
    return pixels.astype(np.uint8)


def check_image_format(image_format: str) -> None:
    """Raises an InputError if it is neither RGB nor BGR."""
    if image_format not in (RGB, BGR):
        raise InputError(f"image_format must be in ['RGB', 'BGR'], is {image_format}.")


def checked_points(coords: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """One prompt's points: (N, 2) float, (x, y) in the frame they came in, and (N,) int64 labels."""
    if labels is None:
        raise InputError("point_labels must be supplied if point_coords is supplied.")
    coords, labels = np.asarray(coords, float), np.asarray(labels)
    if coords.ndim != 2 or coords.shape[1] != 2 or labels.shape != coords.shape[:1]:
        raise InputError(
            "expected point_coords (N, 2), (x, y) in pixels, and as many point_labels (N,), got shapes "
            f"{coords.shape} and {labels.shape}"
        )
    if not np.isfinite(coords).all():
        raise InputError("point_coords hold NaN or infinity")
    if labels.size and not (labels.min() >= PADDING and labels.max() <= BOX_BOTTOM_RIGHT):
        raise InputError(
            f"point_labels are 1 for the object and 0 for what is not, got {labels.tolist()}"
        )
    return coords, labels.astype(np.int64)


def checked_box(box: Any) -> np.ndarray:
    """One prompt's box as (4,) float, xyxy in the frame it came in."""
    values = np.asarray(box, float)
    if values.shape not in ((4,), (1, 4)):
        raise InputError(
            f"expected one box (x0, y0, x1, y1), got shape {values.shape}; for many use predict_torch "
            "or predict_batch"
        )
    if not np.isfinite(values).all():
        raise InputError("box holds NaN or infinity")
    return values.reshape(4)


def checked_mask(mask: Any, side: int) -> np.ndarray:
    """One prompt's mask as (1, side, side) float32 logits."""
    logits = np.asarray(mask, np.float32)
    if logits.shape != (1, side, side):
        raise InputError(
            f"expected mask_input (1, {side}, {side}), the low-resolution logits of an earlier answer, got "
            f"shape {logits.shape}"
        )
    return logits


def check_together(
    point_coords: Tensor | None,
    point_labels: Tensor | None,
    boxes: Tensor | None,
    mask_input: Tensor | None,
    side: int,
) -> None:
    """Raises an InputError if these are not P prompts, as `SamPredictor.predict_torch` takes them.

    Args:
        point_coords, point_labels, boxes, mask_input: see there.
        side: of a mask.
    """
    counts = {}
    if point_coords is not None:
        if point_labels is None:
            raise InputError("point_labels must be supplied if point_coords is supplied.")
        shape = tuple(point_coords.shape)
        if len(shape) != 3 or shape[2] != 2 or point_labels.shape != shape[:2]:
            raise InputError(
                "expected point_coords (P, N, 2) and as many point_labels (P, N), got shapes "
                f"{shape} and {tuple(point_labels.shape)}"
            )
        if not ((point_labels >= PADDING) & (point_labels <= BOX_BOTTOM_RIGHT)).all():
            raise InputError(
                "point_labels are 1 for the object and 0 for what is not, got "
                f"{sorted(set(point_labels.flatten().tolist()))}"
            )
        counts["point_coords"] = shape[0]
    if boxes is not None:
        if boxes.shape[-1:] != (4,):
            raise InputError(f"expected boxes (P, 4), xyxy, got shape {tuple(boxes.shape)}")
        counts["boxes"] = boxes.numel() // 4
    if mask_input is not None:
        shape = tuple(mask_input.shape)
        if len(shape) != 4 or shape[1:] != (1, side, side):
            raise InputError(
                f"expected mask_input (P, 1, {side}, {side}), the low-resolution logits of earlier "
                f"answers, got shape {shape}"
            )
        if shape[0] != 1 or not counts:
            counts["mask_input"] = shape[0]
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise InputError(f"expected as many prompts of each kind, got {given}")


class Asked(NamedTuple):
    """What is asked about one image of a batch.

    Attributes:
        rows: a prompt each: points, labels, box and mask, None for what it has not.
        has_axis: whether the prompts came with a dimension of their own.
    """

    rows: list[tuple[Any, Any, Any, Any]]
    has_axis: bool


def split_batch(kinds: Sequence[Sequence[Any] | None], num_images: int) -> list[Asked]:
    """Sorts the lists that `SamPredictor.predict_batch` takes by image and prompt.

    Args:
        kinds: points, labels, boxes and masks.
        num_images: that each list has items for.

    Raises:
        InputError: a list has too many items or too few, or an image's do not fit each other.
    """
    for kind in kinds:
        if kind is not None and len(kind) != num_images:
            raise InputError(
                f"expected lists with an item for each of the {num_images} images that are set, got "
                f"{len(kind)}"
            )
    columns = [[None] * num_images if kind is None else kind for kind in kinds]
    return [_asked(items, index) for index, items in enumerate(zip(*columns, strict=True))]


def _asked(items: tuple[Any, ...], index: int) -> Asked:
    if all(item is None for item in items):
        raise InputError(f"image {index} of the batch has no prompt; [] asks it nothing")
    split = [_split(item, ndim) for item, ndim in zip(items, (2, 1, 1, 3), strict=True)]
    lengths = {len(rows) for rows, _ in split if rows is not None}
    if len(lengths) > 1:
        raise InputError(
            f"image {index} of the batch has points, labels, boxes and masks for different numbers of "
            f"prompts: {sorted(lengths)}"
        )
    length = lengths.pop()
    points, labels, boxes, masks = ([None] * length if rows is None else rows for rows, _ in split)
    return Asked(
        list(zip(points, labels, boxes, masks, strict=True)), any(axis for _, axis in split)
    )


def _split(values: Any, ndim: int) -> tuple[list[Any] | None, bool]:
    """What an image's prompts have of one kind, and whether they came with a dimension of their own.

    Args:
        values: None, what one prompt has (`ndim` dimensions), or all prompts' as an array with one
            dimension more or as a list, in which None stands for a prompt without it.
        ndim: of what one prompt has.
    """
    if values is None:
        return None, False
    is_list = isinstance(values, Sequence)
    if is_list and (not len(values) or any(v is None or np.ndim(v) == ndim for v in values)):
        return list(values), True
    array = np.asarray(values)
    if array.ndim not in (ndim, ndim + 1):
        raise InputError(
            f"expected {ndim} dimensions for one prompt, or {ndim + 1} for several, got shape "
            f"{array.shape}"
        )
    return ([array], False) if array.ndim == ndim else (list(array), True)
