import logging

import numpy as np
import pytest
from PIL import Image

from sam_train.data.folder import FolderItems
from sam_train.data.mask_matching import match_masks
from sam_train.ops import rle

SIZE = (20, 30)


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Makes images of these names and builds the items; masks are put in `masks/` by the test."""

    def build(*names, **settings):
        for name in names:
            save(tmp_path / "images" / name, np.full((*SIZE, 3), 80, np.uint8))
        return FolderItems(
            images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), **settings
        )

    return build


def labels(*values, dtype=np.uint8):
    """Stripes of these values, each of three columns, on 0."""
    made = np.zeros(SIZE, dtype)
    for index, value in enumerate(values):
        made[2:-2, 3 * index + 1 : 3 * index + 4] = value
    return made


def masks_of(items, index=0):
    return [rle.decode(annotation.rle) for annotation in items.record(index).annotations]


def assert_stripes(items, values, drawn, index=0):
    found = masks_of(items, index)
    assert len(found) == len(values)
    for mask, value in zip(found, sorted(values), strict=True):
        np.testing.assert_array_equal(mask, drawn == value)


def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(folder, tmp_path):
    save(tmp_path / "masks" / "a.png", labels(1, 2))
    picture, shrink = folder("a.jpg").record(0).reduced_image(4)
    assert (shrink, picture.size) == (4, (8, 5))  # 30 x 20 / 4, rounded up


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB"])
@pytest.mark.parametrize("kind", ["auto", "index"])
def test_the_value_of_a_pixel_is_its_object(folder, tmp_path, mode, kind, caplog):
    values = (1, 2, 700) if mode == "I;16" else (1, 2, 70)
    drawn = labels(*values, dtype=np.uint16 if mode == "I;16" else np.uint8)
    pixels = np.repeat(drawn[..., None], 3, axis=2) if mode == "RGB" else drawn
    save(tmp_path / "masks" / "a.png", pixels, mode)
    with caplog.at_level(logging.INFO):
        items = folder("a.jpg", kind=kind)
        assert_stripes(items, values, drawn)
    assert kind == "index" or "kind=index" in caplog.text


@pytest.mark.parametrize("kind", ["auto", "colour"])
def test_the_colour_of_a_pixel_is_its_object(folder, tmp_path, kind):
    pixels = np.zeros((*SIZE, 4), np.uint8)
    pixels[:5], pixels[5:9], pixels[9:12] = (255, 0, 0, 255), (0, 0, 9, 255), (0, 7, 0, 0)
    save(tmp_path / "masks" / "a.png", pixels)
    items = folder("a.jpg", kind=kind)
    found = masks_of(items)
    assert [np.flatnonzero(mask.any(axis=1))[[0, -1]].tolist() for mask in found] == [
        [0, 4],
        [5, 8],
    ]


@pytest.mark.parametrize(
    "names", [["a/1.png", "a/2.png"], ["a_1.png", "a-2.png"], ["x/a/m/3.png", "a (2).png"]]
)
@pytest.mark.parametrize("kind", ["auto", "objects"])
def test_each_file_is_an_object(folder, tmp_path, names, kind):
    for index, name in enumerate(names):
        save(tmp_path / "masks" / name, 255 * labels(*(1 if i == index else 0 for i in range(2))))
    items = folder("a.jpg", "ab.jpg", kind=kind)
    assert len(items) == 1
    # In the order of their paths.
    assert sorted(np.flatnonzero(mask.any(axis=0))[0] for mask in masks_of(items)) == [1, 4]


@pytest.mark.parametrize(
    ("white", "dtype", "kind"),
    [
        (255, np.uint8, "objects"),
        (1, np.uint8, "index"),
        (65535, np.uint16, "objects"),
    ],
)
def test_one_file_in_black_and_white_is_one_object(folder, tmp_path, white, dtype, kind, caplog):
    drawn = labels(white, white, dtype=dtype)
    save(tmp_path / "masks" / "a.png", drawn)
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(masks_of(folder("a.jpg"))[0], drawn > 0)
    assert f"kind={kind}" in caplog.text and "no values but" in caplog.text


def test_a_soft_mask_is_cut_at_the_threshold_and_not_taken_for_numbers(folder, tmp_path):
    soft = np.zeros(SIZE, np.uint8)
    soft[:10] = 255
    soft[10], soft[11] = 200, 60
    save(tmp_path / "masks" / "a.png", soft)
    np.testing.assert_array_equal(masks_of(folder("a.jpg"))[0], soft > 127)
    np.testing.assert_array_equal(masks_of(folder("a.jpg", threshold=0.1))[0], soft > 25)


def test_an_almost_black_mask_of_a_jpeg_is_no_object(folder, tmp_path):
    save(tmp_path / "masks" / "a.png", labels(3, 2))
    save(tmp_path / "masks" / "b.png", labels(255))
    items = folder("a.jpg", "b.jpg", kind="objects")
    assert masks_of(items, 0) == [] and len(masks_of(items, 1)) == 1


def test_alpha_is_the_mask_where_the_colour_says_nothing(folder, tmp_path):
    drawn = labels(255)
    white = np.full((*SIZE, 3), 255, np.uint8)
    save(tmp_path / "masks" / "a.png", np.concatenate([white, drawn[..., None]], axis=2))
    np.testing.assert_array_equal(masks_of(folder("a.jpg", kind="objects"))[0], drawn > 0)


def test_parts_that_do_not_touch_may_be_objects_of_their_own(folder, tmp_path):
    drawn = np.zeros(SIZE, np.uint8)
    drawn[1:4, 1:4] = drawn[8:12, 9:20] = 255
    drawn[12, 20] = 255  # touches by its corner
    save(tmp_path / "masks" / "a.png", drawn)
    found = masks_of(folder("a.jpg", components=True))
    assert [mask.sum() for mask in found] == [9, 45]
    assert [a.id for a in folder("a.jpg", components=True).record(0).annotations] == [0, 1]


def test_values_that_are_no_object_can_be_named(folder, tmp_path):
    drawn = labels(1, 2, 255)
    save(tmp_path / "masks" / "a.png", drawn, "P")
    assert_stripes(folder("a.jpg", background=[0, 255]), (1, 2), drawn)


def test_what_stays_alone_is_named_and_counted(folder, tmp_path, caplog):
    save(tmp_path / "masks" / "a.png", labels(1, 2))
    save(tmp_path / "masks" / "stray.png", labels(1))
    items = folder("a.jpg", "lonely.jpg")
    assert len(items) == 1 and items.describe(0) == "a"
    assert "1 image is left out for want of a mask:" in caplog.text and "lonely.jpg" in caplog.text
    assert "1 mask is left out for want of an image:" in caplog.text and "stray.png" in caplog.text


def test_a_folder_above_the_masks_is_not_their_image(tmp_path):
    for name in ("001", "002"):
        save(tmp_path / "001" / "images" / f"{name}.jpg", np.full((*SIZE, 3), 80, np.uint8))
        save(tmp_path / "001" / "masks" / f"{name}_1.png", 255 * labels(1))
        save(tmp_path / "001" / "masks" / f"{name}_2.png", 255 * labels(0, 1))
    items = FolderItems(
        images=str(tmp_path / "001" / "images"), masks=str(tmp_path / "001" / "masks")
    )
    assert [len(masks_of(items, index)) for index in range(len(items))] == [2, 2]


def test_one_folder_may_hold_both_by_globs(tmp_path):
    for name in ("x", "y"):
        save(tmp_path / name / "images" / f"{name}.png", np.full((*SIZE, 3), 80, np.uint8))
        save(tmp_path / name / "masks" / "1.png", 255 * labels(1))
        save(tmp_path / name / "masks" / "2.png", 255 * labels(0, 1))
    items = FolderItems(images=str(tmp_path / "*/images"), masks=str(tmp_path / "*/masks"))
    assert [len(masks_of(items, index)) for index in range(2)] == [2, 2]


@pytest.mark.parametrize(
    ("mask", "settings", "said"),
    [
        (np.zeros((9, 9), np.uint8), {"kind": "index"}, "is 9 x 9 pixels .* the image 20 x 30"),
        (np.zeros((9, 9), np.uint8), {"kind": "objects"}, "is 9 x 9 pixels"),
        (np.zeros((9, 9, 3), np.uint8), {"kind": "colour"}, "is 9 x 9 pixels"),
        (np.arange(1800, dtype=np.uint8).reshape(20, 30, 3), {"kind": "index"}, "say kind=colour"),
    ],
)
def test_a_mask_that_does_not_fit_says_so(folder, tmp_path, mask, settings, said):
    save(tmp_path / "masks" / "a.png", mask)
    with pytest.raises(ValueError, match=said):
        folder("a.jpg", **settings).record(0)


def test_a_damaged_mask_is_named(folder, tmp_path):
    save(tmp_path / "masks" / "b.png", labels(1, 2))
    (tmp_path / "masks" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        folder("a.jpg", "b.jpg").record(0)


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="kind is one of"):
        folder("a.jpg", kind="colors")
    with pytest.raises(FileNotFoundError, match=r"masks.*data\.masks"):
        len(folder("a.jpg"))
    save(tmp_path / "masks" / "other.png", labels(1))
    with pytest.raises(FileNotFoundError, match="expected the same names"):
        len(folder("a.jpg"))
    save(tmp_path / "masks" / "a_1.png", labels(1))
    save(tmp_path / "masks" / "a_2.png", labels(1))
    with pytest.raises(ValueError, match="one mask file an image, .*a.jpg has 2"):
        len(folder("a.jpg", kind="index"))


@pytest.mark.parametrize(
    ("images", "mask", "owner"),
    [
        (["i/a.jpg"], "m/a.png", "i/a.jpg"),
        (["i/x/0.jpg", "i/y/0.jpg"], "m/y/0.png", "i/y/0.jpg"),
        (["i/x/0.jpg", "i/y/0.jpg"], "m/z/0.png", None),
        (["i/img1.jpg", "i/img10.jpg"], "m/img10_mask.png", "i/img10.jpg"),
        (["i/img1.jpg"], "m/img10_mask.png", None),
        (["i/a.jpg", "i/a_b.jpg"], "m/a_b_1.png", "i/a_b.jpg"),
        (["i/a.b.jpg"], "m/a.b.png", "i/a.b.jpg"),
        (["i/benign (1).png"], "m/benign (1)_mask_1.png", "i/benign (1).png"),
    ],
)
def test_a_mask_belongs_to_the_image_of_its_name(images, mask, owner):
    found = match_masks(images, [mask], ".")
    assert [image for image, own in found.owned.items() if own] == ([owner] if owner else [])
    assert list(found.alone) == ([] if owner else [mask])


def test_a_mask_file_of_one_dark_value_is_an_object_and_of_several_is_damage(tmp_path):
    save(tmp_path / "images" / "a.jpg", np.full((*SIZE, 3), 80, np.uint8))
    save(tmp_path / "masks" / "a" / "1.png", (38 * (labels(1) > 0)).astype(np.uint8))
    items = FolderItems(
        images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), kind="objects"
    )
    assert len(masks_of(items, 0)) == 1

    two = (38 * (labels(1) > 0)).astype(np.uint8)
    two[-1, -1] = 60
    save(tmp_path / "masks" / "a" / "1.png", two)
    with pytest.raises(ValueError, match=r"1\.png exceeds threshold=0\.5"):
        items.record(0)


def a_set(folder, tmp_path, usual, odd, **settings):
    """A hundred images with the same mask but for one that is not among those looked at."""
    for number in range(100):
        save(tmp_path / "masks" / f"{number:03d}.png", odd if number == 7 else usual)
    return folder(*(f"{number:03d}.jpg" for number in range(100)), **settings)


def test_masks_of_0_and_1_with_one_of_two_objects_among_them_are_one_kind(folder, tmp_path):
    odd = labels(1, 2)
    items = a_set(folder, tmp_path, labels(1), odd)
    assert items.pairs.kind.name == "index"
    assert_stripes(items, [1], labels(1), 6)
    assert_stripes(items, [1, 2], odd, 7)


SOFT_MASK = np.repeat(np.linspace(0, 4000, SIZE[0]).clip(0, 255).astype(np.uint8)[:, None], 30, 1)


@pytest.mark.parametrize(
    ("usual", "odd", "said"),
    [
        (labels(255), labels(1, 2), "kind=objects, .*but by itself it is kind=index"),
        (labels(255), labels(50, 128, 200), "kind=objects, .*but by itself it is kind=index"),
        (labels(128), labels(128, 129), "kind=objects, .*but by itself it is kind=index"),
        (labels(1), SOFT_MASK, "kind=index, .*but by itself it is kind=objects"),
        (
            labels(255),
            np.stack([labels(255, 9), labels(9), labels(1)], 2),
            "itself it is kind=colour",
        ),
    ],
)
def test_a_mask_of_another_kind_than_those_looked_at_is_damage_that_names_the_setting(
    folder, tmp_path, usual, odd, said
):
    items = a_set(folder, tmp_path, usual, odd)
    assert len(masks_of(items, 6)) == 1
    with pytest.raises(ValueError, match=rf"007\.png .*{said}.*data\.train\.items\.kind="):
        items.record(7)
    stated = a_set(folder, tmp_path, usual, odd, kind="index" if odd.ndim == 2 else "colour")
    assert len(masks_of(stated, 7)) > 1


@pytest.mark.parametrize("odd", [labels(0), labels(1), labels(70), SOFT_MASK])
def test_other_masks_of_one_object_are_no_other_kind(folder, tmp_path, odd):
    items = a_set(folder, tmp_path, labels(255), odd)
    assert len(masks_of(items, 7)) == int(odd.any())


def test_a_mask_that_counts_as_black_is_said_once(folder, tmp_path, caplog):
    for name, values in {"a/1": (255,), "a/2": (0, 255), "b": (2, 3), "c": (1, 2)}.items():
        save(tmp_path / "masks" / f"{name}.png", labels(*values))
    items = folder("a.jpg", "b.jpg", "c.jpg")
    assert [len(masks_of(items, index)) for index in range(3)] == [2, 0, 0]
    assert caplog.text.count("counts as black") == 1 and "kind=index" in caplog.text


def test_photographs_are_not_taken_for_their_own_masks(tmp_path):
    save(tmp_path / "a.jpg", np.full((*SIZE, 3), 80, np.uint8))
    items = FolderItems(images=str(tmp_path), masks=str(tmp_path))
    with pytest.raises(ValueError, match=r"same files.*\*_mask\.png"):
        len(items)
