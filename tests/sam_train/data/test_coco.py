import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from sam_train.data.coco import CocoItems, PanopticItems
from sam_train.data.indexed import IndexedSource
from sam_train.data.json_lists import elements
from sam_train.data.source import UnusableSourceError
from sam_train.ops import rle

HEIGHT, WIDTH = 40, 60
TRIANGLE, BOX = [5.5, 5, 30, 8, 12, 33.25], [40, 2, 55, 2, 55, 20, 40, 20]


def an_rle(mask: np.ndarray, compressed: bool) -> dict:
    encoded = rle.encode(mask)
    if compressed:
        return encoded
    return {"size": encoded["size"], "counts": rle.run_lengths(encoded).tolist()}


def blob(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((HEIGHT, WIDTH)) < 0.3


KINDS = {
    1: [TRIANGLE],
    2: [TRIANGLE, BOX],
    3: an_rle(blob(1), compressed=True),
    4: an_rle(blob(2), compressed=False),
    5: [[-20, -20, 30, -3, 25, 70]],
}


@pytest.fixture
def write(tmp_path):
    """Writes a COCO file; what is not given is one image of all kinds of annotation."""
    (tmp_path / "images" / "deep").mkdir(parents=True)

    def build(images=None, annotations=None, name="coco.json", **more):
        if images is None:
            images = [{"id": 7, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}]
        if annotations is None:
            annotations = [
                {"id": i, "image_id": 7, "category_id": 1, "iscrowd": 0, "segmentation": s}
                for i, s in KINDS.items()
            ]
        for image in images:
            path = tmp_path / "images" / str(image.get("file_name"))
            if "missing" not in path.name and path.parent.is_dir():
                Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(path)
        content = {"info": {"a": [1, {"b": 2}]}, "images": images, "annotations": annotations}
        (tmp_path / name).write_text(json.dumps(content | more))
        return CocoItems(images=str(tmp_path / "images"), annotations=str(tmp_path / name))

    return build


def one(image_id=7, number=1, **changes):
    return {"id": number, "image_id": image_id, "iscrowd": 0, "segmentation": [BOX]} | changes


def image(image_id, file_name, **changes):
    return {"id": image_id, "file_name": file_name, "height": HEIGHT, "width": WIDTH} | changes


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # pycocotools' own
def test_masks_are_those_of_pycocotools(write):
    items = write(categories=[{"id": 1, "name": "Gefäß"}])
    reference = COCO(items.annotations)

    record = items.record(0)

    assert (record.key, record.size) == ("a", (HEIGHT, WIDTH))
    assert record.image.shape == (HEIGHT, WIDTH, 3)
    assert len(record.annotations) == len(KINDS)
    for annotation in record.annotations:
        expected = reference.annToMask(reference.anns[annotation.id]).astype(bool)
        np.testing.assert_array_equal(rle.decode(annotation.rle), expected)
        assert isinstance(annotation.rle["counts"], str)
        assert annotation.area == expected.sum()
        assert annotation.bbox == rle.bbox(annotation.rle)
        assert annotation.extra == {"category_id": 1, "category": "Gefäß"}


def test_a_jpeg_is_decoded_at_a_fraction_of_its_size_by_any_process_and_a_png_is_not(write):
    items = write(
        images=[image(7, "a.jpg"), image(8, "b.png")],
        annotations=[one(), one(image_id=8, number=2)],
    )
    reduced, whole = (pickle.loads(pickle.dumps(items.record(index))) for index in (0, 1))

    picture, shrink = reduced.reduced_image(4)
    assert (shrink, picture.size) == (4, (WIDTH // 4, HEIGHT // 4))
    assert np.asarray(picture).mean() == pytest.approx(90, abs=2)
    picture, shrink = whole.reduced_image(4)
    assert (shrink, picture.size) == (1, (WIDTH, HEIGHT))


def test_crowds_are_left_out_unless_asked_for_and_that_is_said_once(write, caplog):
    crowd = one(number=2, iscrowd=1, segmentation=an_rle(blob(3), compressed=False))
    items = write(annotations=[one(), crowd])
    assert [a.id for a in items.record(0).annotations] == [1]
    assert [a.id for a in items.record(0).annotations] == [1]
    assert caplog.text.count("1 crowds (include_crowds=true takes them) are left out") == 1

    both = CocoItems(images=items.images, annotations=items.annotations, include_crowds=True)
    assert [a.extra.get("iscrowd") for a in both.record(0).annotations] == [None, 1]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (one(number=2, segmentation=[[1, 2, 3, 4]]), "fewer than three points"),
        (one(number=2, segmentation=[]), "without a segmentation"),
        ({"id": 2, "image_id": 7, "bbox": [1, 2, 3, 4]}, "without a segmentation"),
        (one(image_id=99, number=2), "images that the file does not list"),
        (one(), "annotations that are there twice"),
    ],
)
def test_an_annotation_that_is_no_mask_is_left_out_and_counted(write, caplog, entry, said):
    items = write(annotations=[one(), entry])
    assert [a.id for a in items.record(0).annotations] == [1]
    assert said in caplog.text and "coco.json: 1 " in caplog.text


def test_two_annotations_of_one_id_are_both_kept(write):
    items = write(annotations=[one(), one(segmentation=[TRIANGLE])])
    assert [a.id for a in items.record(0).annotations] == [1, 1]


def test_images_without_annotations_are_left_out_and_counted(write, caplog):
    items = write(images=[image(7, "a.jpg"), image(8, "b.jpg")], annotations=[one()])
    assert len(items) == 1
    assert "1 images without a usable annotation are left out" in caplog.text


@pytest.mark.parametrize(
    ("images", "annotations", "said"),
    [
        ([image(7, "missing.jpg")], [one()], "there is no image missing.jpg"),
        ([image(7, "a.jpg"), image(7, "b.jpg")], [one()], "its id 7 is that of another image"),
        ([image(7, "a.jpg", height=HEIGHT - 1)], [one()], f"image is {HEIGHT} x {WIDTH}"),
        ([image(7, "a.jpg", width="9")], [one()], "no size"),
        (
            [image(7, "a.jpg")],
            [one(segmentation={"size": [9, 9], "counts": [81]})],
            "annotation 1 is unusable: its RLE is 9 x 9",
        ),
        (
            [image(7, "a.jpg")],
            [one(segmentation={"size": [HEIGHT, WIDTH], "counts": [3, 4]})],
            "its runs cover 7 pixels",
        ),
        ([image(7, "a.jpg")], [one(segmentation=[[0, 0, 1e9, 0, 5, 5]])], "by far"),
        ([image(7, "a.jpg")], [one(segmentation=[[0, 0, float("nan"), 0, 5, 5]])], "by far"),
        ([image(7, "a.jpg")], [one(segmentation=[["a", 0, 1, 0, 5, 5]])], "is unusable"),
        ([image(7, "a.jpg")], [one(segmentation="abc")], "is unusable"),
    ],
)
def test_damage_is_that_of_one_image(write, caplog, images, annotations, said):
    good = [image(100, "good.jpg")]
    items = write(images=images + good, annotations=[*annotations, one(image_id=100, number=50)])
    source = IndexedSource(items=items, max_bad_fraction=1)
    kept = []
    for record in source.records(epoch=0, reader=0, num_readers=1, shuffle=False):
        try:
            record.image  # noqa: B018
            kept.append(record.key)
        except ValueError:
            continue
    assert kept == ["good"]
    assert said in caplog.text


def test_sizes_may_be_absent_and_images_lie_deeper_or_not(write):
    items = write(
        images=[{"id": 7, "file_name": "deep/a.jpg"}, {"id": "x", "file_name": "gone/b.jpg"}],
        annotations=[one(), one(image_id="x", number=2)],
    )
    assert items.record(0).size == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="no image gone/b.jpg"):
        items.record(1)


def put(folder, *names, size=(HEIGHT, WIDTH)):
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(folder / "images" / name)


@pytest.mark.parametrize(
    ("stated", "file"),
    [("train2017/1.jpg", "1.jpg"), ("1.jpg", "train/x/1.jpg"), ("a/1.jpg", "b/1.jpg")],
)
def test_an_image_elsewhere_is_found_by_its_bare_name_and_that_is_said(
    write, tmp_path, caplog, stated, file
):
    items = write(images=[image(7, stated)], annotations=[one()])
    (tmp_path / "images" / stated).unlink(missing_ok=True)
    put(tmp_path, file, "other.jpg")
    assert items.record(0).read_file() == (tmp_path / "images" / file).read_bytes()
    assert caplog.text.count("bare names") == 1


@pytest.mark.parametrize(
    ("names", "files", "said"),
    [
        (["train/1.jpg"], ["a/1.jpg", "b/1.jpg"], "no image train/1.jpg .* be a/1.jpg or b/1.jpg"),
        (["train/1.jpg", "val/1.jpg"], ["1.jpg"], "no image train/1.jpg .* 1.jpg .* val/1.jpg"),
        (["val/1.jpg", "train/1.jpg"], ["train/1.jpg"], "no image val/1.jpg .*that of train/1.jpg"),
    ],
)
def test_of_two_that_may_be_meant_none_is_taken(write, tmp_path, names, files, said):
    images = [image(number, name) for number, name in enumerate(names)]
    # Only the first has annotations: the others' names count all the same.
    items = write(images=images, annotations=[one(image_id=0)])
    put(tmp_path, *files)
    with pytest.raises(ValueError, match=f"{said}.* data.images"):
        items.record(0)


def test_a_file_found_by_its_bare_name_must_have_the_stated_size(write, tmp_path):
    items = write(images=[image(7, "train/1.jpg")], annotations=[one()])
    put(tmp_path, "1.jpg", size=(HEIGHT, WIDTH - 1))
    with pytest.raises(ValueError, match=f"1.jpg is another: it is {HEIGHT} x {WIDTH - 1} pixels"):
        items.record(0)


def test_images_of_one_name_in_several_folders_are_no_problem_where_they_lie_there(write, tmp_path):
    put(tmp_path, "train/1.jpg", "val/1.jpg")
    items = write(
        images=[image(1, "train/1.jpg"), image(2, "val/1.jpg")],
        annotations=[one(image_id=1), one(image_id=2, number=2)],
    )
    assert [items.record(index).key for index in range(2)] == ["train/1", "val/1"]


def test_keys_are_unique(write):
    images = [image(1, "a.jpg"), image(2, "a.png"), image(3, "b.jpg"), image(4, "b.jpg")]
    items = write(images=images, annotations=[one(image_id=i, number=i) for i in range(1, 5)])
    assert [items.describe(i) for i in range(4)] == ["a.jpg", "a.png", "b.jpg#3", "b.jpg#4"]


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"images": [{"id": 1}', '{"images": [1]}', '{"images": []}', "{}"]
)
def test_what_is_no_coco_file_is_one_error(write, text, tmp_path):
    items = write()
    (tmp_path / "coco.json").write_text(text)
    with pytest.raises(ValueError, match=r"coco\.json"):
        len(items)


@pytest.mark.parametrize(
    ("image_id", "owner", "said"),
    [
        (1, "1", r"first `image_id` is '1' \(str\), .* `id` 1 \(int\); expected ids of one type"),
        (1, 2, r"first `image_id` is 2 \(int\), .* `id` 1 \(int\); expected the ids of its images"),
    ],
)
def test_annotations_that_match_no_image_are_one_error_with_an_id_of_each(
    write, image_id, owner, said
):
    items = write(images=[image(image_id, "a.jpg")], annotations=[one(image_id=owner)])
    with pytest.raises(
        ValueError, match=rf"coco\.json: no annotation belongs to an image: .*{said}"
    ):
        len(items)


@pytest.mark.parametrize(
    ("odd_image", "owner", "said"),
    [
        ({"id": 7, "file_name": "."}, 7, "1 images whose file_name names no file are left out"),
        ({"id": 7, "file_name": "/"}, 7, "1 images whose file_name names no file are left out"),
        ({"id": [7], "file_name": "b.jpg"}, 7, "1 images whose id is a list or an object"),
        (image(7, "b.jpg"), [7], "1 annotations whose image_id is a list or an object"),
        (image(7, "b.jpg"), {"a": 7}, "1 annotations whose image_id is a list or an object"),
    ],
)
def test_an_odd_entry_is_left_out_and_counted(write, tmp_path, caplog, odd_image, owner, said):
    items = write(images=[], annotations=[])
    put(tmp_path, "good.jpg")
    images = [odd_image, image(100, "good.jpg")]
    annotations = [one(image_id=owner), one(image_id=100, number=[2])]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))

    assert [items.record(index).key for index in range(len(items))] == ["good"]
    assert said in caplog.text


def test_a_name_that_no_file_can_have_is_damage_of_its_image_even_where_it_is_the_first(
    write, tmp_path
):
    items = write(images=[], annotations=[])
    put(tmp_path, "good.jpg")
    images = [image(7, "a" * 5000), image(100, "good.jpg")]
    annotations = [one(), one(image_id=100, number=2)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))

    assert items.record(1).key == "good"
    with pytest.raises(ValueError, match="file_name a+ cannot be looked for"):
        items.record(0)


def test_missing_paths_are_named(tmp_path, write):
    items = write()
    with pytest.raises(FileNotFoundError, match=r"nowhere.*data\.images"):
        len(CocoItems(images=str(tmp_path / "nowhere"), annotations=items.annotations))
    with pytest.raises(FileNotFoundError, match=r"gone.*data\.annotations"):
        len(CocoItems(images=items.images, annotations=str(tmp_path / "gone.json")))


@pytest.mark.parametrize("text", ["{} ", "", '{"images": [0, ' + " " * 900 + "\xff", None])
@pytest.mark.parametrize("max_bad_fraction", [0, 1])
def test_a_file_that_changes_while_it_is_read_is_one_error(write, tmp_path, text, max_bad_fraction):
    items = write(
        images=[image(7, "a.jpg"), image(8, "b.jpg")],
        annotations=[one(), one(image_id=8, number=2)],
    )
    source = IndexedSource(items=items, max_bad_fraction=max_bad_fraction)
    records = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
    assert next(records).key == "a"
    path = tmp_path / "coco.json"
    path.unlink() if text is None else path.write_text(text, "latin-1")
    with pytest.raises(UnusableSourceError, match=r"coco\.json (has changed|is gone) since.*again"):
        next(records)


def test_a_reader_process_is_sent_places_and_no_annotations(write):
    images = [image(i, f"{i}.jpg") for i in range(200)]
    polygon = np.random.default_rng(0).uniform(0, 40, 400).tolist()
    items = write(
        images=images,
        annotations=[one(image_id=i, number=i, segmentation=[polygon]) for i in range(200)],
    )
    assert len(items) == 200
    assert len(pickle.dumps(items)) < 200 * 100
    arrays = [one for one in vars(items.index).values() if isinstance(one, np.ndarray)]
    assert sum(one.nbytes for one in arrays) == 200 * 16 + 200 * 42 + 8  # as docs/data.md says


def test_elements_have_their_bytes():
    data = '\ufeff {"a":[ ] , "x" : {"b": [1]}, "b": ["ü", {"c": "}]"} ,2]}'.encode()
    found = list(elements(data, ("a", "b")))
    assert [data[e.start : e.start + e.length].decode() for e in found] == [
        '"ü"',
        '{"c": "}]"}',
        "2",
    ]
    assert {e.name for e in found} == {"b"}


def test_panoptic_segments_are_masks_but_for_crowds(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "images" / "a.jpg")
    ids = np.zeros((HEIGHT, WIDTH), np.int64)
    ids[:10], ids[10:20], ids[20:30, 5:9] = 7, 300, 70000
    png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    Image.fromarray(png).save(tmp_path / "masks" / "a.png")
    segments = [{"id": 7, "category_id": 1}, {"id": 300, "iscrowd": 1}, {"id": 70000}]
    content = {
        "images": [image(1, "a.jpg")],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "sky"}],
    }
    (tmp_path / "p.json").write_text(json.dumps(content))
    items = PanopticItems(
        images=str(tmp_path / "images"),
        masks=str(tmp_path / "masks"),
        annotations=str(tmp_path / "p.json"),
    )
    picture, shrink = items.record(0).reduced_image(4)
    assert (shrink, picture.size) == (4, (WIDTH // 4, HEIGHT // 4))
    with caplog.at_level(logging.INFO):
        annotations = items.record(0).annotations
    assert [a.extra for a in annotations] == [{"category_id": 1, "category": "sky"}, {}]
    np.testing.assert_array_equal(rle.decode(annotations[0].rle), ids == 7)
    np.testing.assert_array_equal(rle.decode(annotations[1].rle), ids == 70000)
