"""Images of many kinds: taken by a stated rule, or refused with one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sam_train.data.image_files import read_large_image
from sam_train.data.shards import decode_image
from sam_train.inference.inputs import InputError, check_together, read_pixels

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
STRETCHED = np.rint(GREY * (255 / 220))[..., None].repeat(3, 2)
RGB = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB, RGB),
        (GREY, GREY[..., None].repeat(3, 2)),
        (GREY[..., None], GREY[..., None].repeat(3, 2)),
        (np.dstack([GREY, GREY[::-1]]), GREY[..., None].repeat(3, 2)),
        (np.dstack([RGB, GREY]), RGB),
        (RGB.astype(np.int64), RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32), RGB),
        (GREY.astype(np.uint16) * 100 + 7, np.rint(GREY * (255 / 220))[..., None].repeat(3, 2)),
        (np.full((3, 4), 900, np.uint16), np.zeros((3, 4, 3))),
        (np.dstack([GREY.astype(np.uint16)] * 3 + [np.full((3, 4), 65535, np.uint16)]), None),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), GREY[..., None].repeat(3, 2)),
        (Image.fromarray(np.dstack([RGB, GREY])), RGB),
        (Image.fromarray(GREY > 100), (GREY > 100)[..., None].repeat(3, 2) * 255),
        (RGB[:, ::-1, ::-1], RGB[:, ::-1, ::-1]),
    ],
    ids=[
        "rgb",
        "grey",
        "grey with an axis",
        "grey and alpha",
        "alpha",
        "integers",
        "float64",
        "float32",
        "16 bit",
        "16 bit of one value",
        "16 bit, alpha is not stretched",
        "pillow",
        "pillow grey",
        "pillow alpha",
        "pillow of one bit",
        "a view",
    ],
)
def test_images_are_taken_by_the_stated_rules(image: Any, expected: np.ndarray | None) -> None:
    if expected is None:
        expected = np.rint(GREY * (255 / 220))[..., None].repeat(3, 2)

    pixels = read_pixels(image)

    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


def test_sixteen_bit_arrays_are_taken_as_sixteen_bit_files_are(tmp_path: Any) -> None:
    deep = np.random.default_rng(1).integers(300, 5000, (5, 6)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")

    from_file = decode_image((tmp_path / "deep.png").read_bytes(), (5, 6))

    np.testing.assert_array_equal(read_pixels(deep), from_file)
    np.testing.assert_array_equal(read_pixels(Image.open(tmp_path / "deep.png")), from_file)


def _palette() -> Image.Image:
    return Image.fromarray(RGB).quantize(5)


def _turned() -> Image.Image:
    image = Image.fromarray(RGB)
    image.getexif()[0x0112] = 6  # to be shown a quarter turn clockwise
    return image


FILES = {
    "grey.png": (lambda: Image.fromarray(GREY), GREY[..., None].repeat(3, 2)),
    "one bit.png": (lambda: Image.fromarray(GREY > 90), (GREY > 90)[..., None].repeat(3, 2) * 255),
    "palette.png": (_palette, np.asarray(_palette().convert("RGB"))),
    "palette.gif": (_palette, np.asarray(_palette().convert("RGB"))),
    "alpha.png": (lambda: Image.fromarray(np.dstack([RGB, GREY])), RGB),
    "grey and alpha.png": (
        lambda: Image.fromarray(np.dstack([GREY, GREY])),
        GREY[..., None].repeat(3, 2),
    ),
    "cmyk.tif": (
        lambda: Image.fromarray(RGB).convert("CMYK"),
        np.asarray(Image.fromarray(RGB).convert("CMYK").convert("RGB")),
    ),
    "turned.png": (_turned, RGB),
    "16 bit.png": (lambda: Image.fromarray(GREY.astype(np.uint16) * 100), STRETCHED),
    "float.tif": (lambda: Image.fromarray(GREY.astype(np.float32) * 9 - 7), STRETCHED),
    "32 bit.tif": (lambda: Image.fromarray(GREY.astype(np.int32) * 1000), STRETCHED),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_by_the_stated_rules_and_as_they_lie(tmp_path: Path, name: str) -> None:
    make, expected = FILES[name]
    image = make()
    image.save(tmp_path / name, exif=image.getexif())

    pixels = read_large_image(tmp_path / name, 100)

    np.testing.assert_array_equal(pixels, expected)
    if not name.startswith(("float", "32")):  # which arrays are refused for, if not in range
        with Image.open(tmp_path / name) as opened:
            np.testing.assert_array_equal(read_pixels(opened), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 4), "is for set_torch_image"),
        (RGB.tolist(), "NumPy array"),
        (RGB.transpose(2, 0, 1).repeat(2, 2), r"transpose\(1, 2, 0\)"),
        (np.zeros((6, 5, 7), np.uint8), r"got shape \(6, 5, 7\)$"),
        (np.zeros((0, 4, 3), np.uint8), "with pixels"),
        (np.zeros((2, 2, 2, 3), np.uint8), "got shape"),
        (RGB.astype(np.float32), "values from 0 to 1"),
        (np.full((2, 2), np.nan), "values from 0 to 1, got nan"),
        (RGB.astype(np.int16) - 300, "integers from 0 to 255"),
        (GREY > 3, "got bool"),
        (RGB.astype(complex), "got complex"),
    ],
)
def test_others_are_refused_with_one_sentence(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_pixels(image)
    assert "\n" not in str(caught.value)


def test_models_of_other_channels_take_their_own_number() -> None:
    assert read_pixels(GREY, in_chans=1).shape == (3, 4, 1)
    assert read_pixels(np.zeros((3, 4, 5), np.uint8), in_chans=5).shape == (3, 4, 5)
    with pytest.raises(InputError, match="an image of 1 channels"):
        read_pixels(RGB, in_chans=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"point_coords": (1, 2, 2), "boxes": (3, 4)}, "1 of point_coords, 3 of boxes"),
        ({"point_coords": (3, 2, 2), "mask_input": (2, 1, 16, 16)}, "2 of mask_input"),
        ({"boxes": (2, 4), "mask_input": (1, 1, 32, 32)}, r"\(P, 1, 16, 16\)"),
        ({"point_coords": (2, 2)}, r"\(P, N, 2\)"),
        ({"boxes": (2, 2)}, r"\(P, 4\)"),
    ],
)
def test_prompts_that_do_not_go_together_are_refused(
    given: dict[str, tuple[int, ...]], message: str
) -> None:
    tensors: dict[str, Any] = {name: torch.zeros(shape) for name, shape in given.items()}
    labels = tensors["point_coords"][..., 0] if "point_coords" in tensors else None
    tensors = dict.fromkeys(("point_coords", "boxes", "mask_input")) | tensors
    with pytest.raises(InputError, match=message):
        check_together(point_labels=labels, side=16, **tensors)


def test_labels_that_there_are_not_are_named() -> None:
    with pytest.raises(InputError, match=r"got \[1, 5\]"):
        check_together(torch.zeros(1, 2, 2), torch.tensor([[5, 1]]), None, None, 16)


def test_one_mask_is_for_all_prompts() -> None:
    check_together(None, None, torch.zeros(3, 4), torch.zeros(1, 1, 16, 16), 16)
