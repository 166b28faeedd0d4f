import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from sam_train.data import shards
from sam_train.data.shards import decode_record, decode_reduced, encode_record
from sam_train.structures import Annotation


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_record_survives_the_way_through_its_files(make):
    record = make.record("a", np.eye(6, 9, dtype=bool)[None], noise(6, 9))
    full = dataclasses.replace(
        record.annotations[0],
        predicted_iou=0.9,
        stability_score=0.95,
        point_coords=((1.0, 2.0),),
        crop_box=(0.0, 0.0, 9.0, 6.0),
        extra={"source": "assisted", "round": 3},
    )
    record = dataclasses.replace(record, annotations=(record.annotations[0], full))

    back = decode_record("a", encode_record(record, suffix="png"), "made")

    assert (back.key, back.size, back.source) == ("a", (6, 9), "made")
    assert back.annotations == record.annotations
    np.testing.assert_array_equal(back.image, record.image)


def test_what_a_human_mask_lacks_is_not_written(make):
    files = encode_record(make.square("a"), image_id=7)

    content = json.loads(files["json"])
    assert content["image"] == {"image_id": 7, "width": 32, "height": 24, "file_name": "a.jpg"}
    assert set(content["annotations"][0]) == {"id", "segmentation", "bbox", "area"}
    assert isinstance(content["annotations"][0]["segmentation"]["counts"], str)


def test_image_bytes_given_are_kept_as_they_are(make):
    original = encode_record(make.square("a"))["jpg"]
    assert encode_record(make.square("a"), image_bytes=original)["jpg"] is original


def test_pixels_are_decoded_only_when_looked_at(make):
    files = encode_record(make.square("a")) | {"jpg": b"no image"}

    record = decode_record("a", files)

    with pytest.raises(ValueError, match="cannot be decoded"):
        record.image  # noqa: B018


def test_box_and_area_are_measured_where_the_json_lacks_them(make):
    record = make.square("a")
    files = encode_record(record)
    content = json.loads(files["json"])
    del content["annotations"][0]["bbox"], content["annotations"][0]["area"]

    measured: Annotation = decode_record(
        "a", files | {"json": json.dumps(content).encode()}
    ).annotations[0]

    assert (measured.bbox, measured.area) == (record.annotations[0].bbox, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("json"), "no .json"),
        (lambda files: files.pop("jpg"), "no image"),
        (lambda files: files.update(json=b"{"), "does not parse"),
        (lambda files: files.update(json=b"\xff\xfe\x00"), "does not parse"),
        (lambda files: files.update(json=b"[]"), "no object `image`"),
        (lambda files: files.update(json=b'{"image": {"width": 3}}'), "no size"),
        (
            lambda files: files.update(json=b'{"image": {"width": 3, "height": 3}}'),
            "no list `annotations`",
        ),
        (
            lambda files: files.update(json=files["json"].replace(b"[24,32]", b"[32,24]")),
            "annotation 0 .* 32 x 24 .* 24 x 32",
        ),
        (
            lambda files: files.update(json=files["json"].replace(b'"bbox":[', b'"bbox":[1,')),
            "expected 4 numbers",
        ),
    ],
)
def test_a_damaged_sample_says_what_is_wrong(make, change, message):
    files = encode_record(make.square("a"))
    change(files)
    with pytest.raises(ValueError, match=message):
        decode_record("a", files)


@pytest.mark.parametrize(
    "extra",
    [b"NaN", b"-Infinity", b"1e400", b'"\\ud800"', b"123456789012345678901234567890", b"0.1"],
)
def test_json_is_taken_as_pythons_own_parser_takes_it(make, extra):
    files = encode_record(make.square("a"))
    files["json"] = files["json"].replace(b'"id":', b'"note":' + extra + b',"id":')

    read = decode_record("a", files).annotations[0].extra["note"]

    assert repr(read) == repr(json.loads(extra))


def test_pixels_of_another_size_than_stated_are_refused(make):
    files = encode_record(make.square("a")) | {
        "jpg": encode_record(make.square("a", (20, 20)))["jpg"]
    }
    with pytest.raises(ValueError, match="20 x 20 .* 24 x 32"):
        decode_record("a", files).image  # noqa: B018


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_jpeg_is_decoded_at_a_reduced_size_each_pixel_where_it_was(make, shrink):
    height, width = 83, 130
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([x * 1.5, y * 2, 0 * x], axis=2).astype(np.uint8)
    files = encode_record(make.record("a", np.eye(height, width, dtype=bool)[None], ramps))

    picture, taken = decode_record("a", files).reduced_image(shrink)
    pixels = np.asarray(picture)

    assert taken == shrink
    assert pixels.shape == (-(-height // shrink), -(-width // shrink), 3)
    middle = (shrink - 1) / 2  # of the pixels that one covers
    y, x = np.mgrid[: height // shrink - 1, : width // shrink - 1] * shrink
    inner = pixels[: y.shape[0], : y.shape[1]].astype(float)
    np.testing.assert_allclose(inner[..., 0], (x + middle) * 1.5, atol=3)
    np.testing.assert_allclose(inner[..., 1], (y + middle) * 2, atol=3)


def test_what_is_no_jpeg_is_decoded_in_full(make):
    record = make.record("a", np.eye(40, 60, dtype=bool)[None], noise(40, 60))
    files = encode_record(record, suffix="png")

    picture, taken = decode_record("a", files).reduced_image(4)
    of_a_wrong_name = decode_record("a", {"jpg": files["png"], "json": files["json"]})

    assert (picture.size, picture.mode, taken) == ((60, 40), "RGB", 1)
    assert of_a_wrong_name.reduced_image(4)[1] == 1


def test_a_reduced_image_of_another_size_is_refused(make):
    files = encode_record(make.record("a", np.eye(40, 60, dtype=bool)[None], noise(40, 60)))

    with pytest.raises(ValueError, match="40 x 60 pixels .* its JSON says 40 x 64"):
        decode_reduced(files["jpg"], (40, 64), 2)


@pytest.mark.parametrize("size", [(5, 300), (300, 3), (1, 90), (17, 301)])
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_reduced_picture_is_of_the_scale_it_is_said_to_be_of_even_where_a_side_is_tiny(
    make, size, shrink
):
    record = make.record("a", np.ones((1, *size), dtype=bool), noise(*size))
    record = decode_record("a", encode_record(record))
    picture, taken = record.reduced_image(shrink)
    assert (picture.height, picture.width) == (-(-size[0] // taken), -(-size[1] // taken))


def test_a_large_image_is_handed_out_in_strips_and_is_the_same(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 21, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    monkeypatch.setattr(shards, "STRIP_PX", 100)

    np.testing.assert_array_equal(shards.decode_image(data.getvalue(), (37, 21)), pixels)
