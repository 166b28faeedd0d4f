"""sam-segment: results as SA-1B JSON, going on after a stop, broken images, prompts that do not fit."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam_train import cli
from sam_train.data.image_files import TooLargeError
from sam_train.data.shards import decode_record
from sam_train.data.source import UnusableSourceError
from sam_train.inference.inputs import InputError
from sam_train.inference.predictor import SamPredictor
from sam_train.inference.prompted import BoxSegmenter, PointSegmenter
from sam_train.inference.segment_files import SegmentFiles
from sam_train.models.sam import Sam
from sam_train.ops import rle
from sam_train.structures import Annotation

MADE_WITH = {"checkpoint": "a.ckpt", "model": "abc", "mode": {"points": [[3, 4, 1]]}}


class Quarter:
    """Answers every image with its upper left quarter, and counts."""

    def __init__(self, stop_after: int = 100) -> None:
        self.num_images, self.stop_after = 0, stop_after

    def segment(self, image: np.ndarray) -> list[Annotation]:
        if self.num_images == self.stop_after:
            raise KeyboardInterrupt
        self.num_images += 1
        mask = np.zeros(image.shape[:2], bool)
        mask[: image.shape[0] // 2, : image.shape[1] // 2] = True
        empty, full = rle.encode(mask & False), rle.encode(mask)
        return [
            Annotation(id=i, rle=found, bbox=rle.bbox(found), area=rle.area(found))
            for i, found in enumerate((full, empty))
        ]


@pytest.fixture
def folder(tmp_path: Path, picture: Callable[[int, int], np.ndarray]) -> Path:
    """Three images, one of them in a folder below."""
    for name, size in (("a.png", (40, 60)), ("b.jpg", (30, 30)), ("more/c.tif", (64, 20))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(*size)).save(path)
    return tmp_path / "images"


def test_results_are_samples_of_sa_1b_and_pictures(tmp_path: Path, folder: Path) -> None:
    done = SegmentFiles(images=str(folder), out=tmp_path / "out").run(Quarter(), MADE_WITH)

    assert (done.num_images, done.num_masks, done.num_empty) == (3, 3, 3)
    assert "3 answers were empty and are left out" in str(done)
    data = (tmp_path / "out/masks/more/c.json").read_bytes()
    record = decode_record("c", {"json": data, "png": b""})
    assert record.size == (64, 20) and record.annotations[0].area == 320
    assert json.loads(data)["image"]["file_name"] == "c.tif"
    with Image.open(tmp_path / "out/overlays/a.jpg") as overlay:
        pixels = np.asarray(overlay).astype(int)
    with Image.open(folder / "a.png") as image:
        difference = np.abs(pixels - np.asarray(image)).sum(axis=2)
    assert difference[:18, :28].mean() > 5 * difference[24:, 34:].mean()


def test_a_picture_of_a_large_image_is_small_and_shows_the_same(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(np.full((300, 900, 3), 100, np.uint8)).save(path)

    SegmentFiles(images=str(path), out=tmp_path, overlay_px=90).run(Quarter(), MADE_WITH)

    with Image.open(tmp_path / "overlays/large.jpg") as overlay:
        changed = np.abs(np.asarray(overlay).astype(int) - 100).sum(axis=2) > 30
    assert changed.shape == (30, 90)
    assert changed[:14, :44].mean() > 0.95 and changed[17:, 47:].mean() < 0.05


def test_a_stop_loses_only_the_open_image(tmp_path: Path, folder: Path) -> None:
    files = SegmentFiles(images=str(folder), out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        files.run(Quarter(stop_after=2), MADE_WITH)
    rest = Quarter()

    done = files.run(rest, MADE_WITH | {"checkpoint": "the/same/elsewhere.ckpt"})

    assert (rest.num_images, done.num_before) == (1, 2)
    assert not list((tmp_path / "out").rglob(".*")), "nothing half written is left"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": "another"}, "another model"),
        ({"mode": {"points": [[3, 4, 0]]}}, "another mode"),
    ],
)
def test_what_another_model_or_prompt_made_is_not_taken_as_done(
    tmp_path: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    what: str,
) -> None:
    files = SegmentFiles(images=str(folder / "a.png"), out=tmp_path / "out")
    files.run(Quarter(), MADE_WITH)
    again = Quarter()

    with caplog.at_level(logging.WARNING):
        files.run(again, MADE_WITH | change)

    assert again.num_images == 1
    assert what in caplog.text


def test_an_image_that_was_replaced_is_done_anew(tmp_path: Path, folder: Path) -> None:
    files = SegmentFiles(images=str(folder / "*.*"), out=tmp_path / "out")
    files.run(Quarter(), MADE_WITH)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "a.png")
    again = Quarter()

    assert files.run(again, MADE_WITH).num_before == 1
    assert again.num_images == 1


def test_a_json_of_somebody_else_is_never_overwritten(tmp_path: Path, folder: Path) -> None:
    place = tmp_path / "out/masks/a.json"
    place.parent.mkdir(parents=True)
    place.write_text('{"image": {}, "annotations": []}')

    with pytest.raises(ValueError, match="a.json is there and not from sam-segment"):
        SegmentFiles(images=str(folder), out=tmp_path / "out").run(Quarter(), MADE_WITH)
    assert place.read_text() == '{"image": {}, "annotations": []}'


def test_its_own_pictures_are_no_images(tmp_path: Path, folder: Path) -> None:
    files = SegmentFiles(images=str(folder), out=folder / "found")
    files.run(Quarter(), MADE_WITH)
    assert files.run(Quarter(), MADE_WITH).num_before == 3


def test_broken_images_are_named_and_too_many_are_an_error(tmp_path: Path, folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    lenient = SegmentFiles(images=str(folder), out=tmp_path / "out", max_bad_fraction=0.3)

    done = lenient.run(Quarter(), MADE_WITH)

    assert done.num_images == 3 and done.broken == [str(folder / "broken.png")]
    assert "1 cannot be read" in str(done)
    strict = SegmentFiles(images=str(folder), out=tmp_path / "out")
    with pytest.raises(UnusableSourceError, match=r"1 of 4 .* damaged .*broken.png"):
        strict.run(Quarter(), MADE_WITH)


def test_an_image_over_pillows_limit_is_taken_and_one_over_ours_is_one_sentence(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice that is an error of Pillow's
    files = SegmentFiles(images=str(folder), out=tmp_path / "out", max_pixels=2399)

    with pytest.raises(TooLargeError, match=r"a.png is 60 x 40 = 2,400 pixels.*max_pixels=2400 to"):
        files.run(Quarter(), MADE_WITH)
    done = replace(files, max_pixels=2400).run(Quarter(), MADE_WITH)

    assert done.num_images == 3
    assert Image.MAX_IMAGE_PIXELS == 1000, "it is everybody's"


def test_a_file_that_only_says_it_is_large_is_never_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_sam_file: Path
) -> None:
    path = tmp_path / "huge.png"
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (90_000).to_bytes(4, "big") * 2  # the header's width and height
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)

    common = [f"checkpoint={tiny_sam_file}", f"images={path}", "img_size=64", f"out={tmp_path}/out"]
    assert cli.run("segment", [*common, "mode=points", "points=[[1,2,1]]"]) == 2

    error = capsys.readouterr().err
    assert "90000 x 90000 = 8,100,000,000 pixels large, more than max_pixels=1000000000" in error
    assert "Traceback" not in error and error.splitlines()[-1].startswith("sam-segment: ")


def test_images_are_found_by_file_folder_and_glob(tmp_path: Path, folder: Path) -> None:
    def keys(images: str) -> list[str]:
        return list(SegmentFiles(images=images, out=tmp_path / "out").find())

    assert keys(str(folder)) == ["a", "b", "more/c"]
    assert keys(str(folder / "b.jpg")) == ["b"]
    assert keys(str(folder / "**" / "*.[jt]*")) == ["b", "more/c"]
    for nothing in (folder / "z.png", folder / "*.gif"):
        with pytest.raises(FileNotFoundError, match="no such|no images"):
            keys(str(nothing))
    (folder / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"both be written to a.json"):
        keys(str(folder))


def test_points_are_one_object_or_one_a_list_and_boxes_one_each(
    tiny_sam: Sam, picture: Callable[[int, int], np.ndarray]
) -> None:
    tiny_sam.set_img_size(64)
    image = picture(50, 80)
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)

    (one,) = PointSegmenter(tiny_sam, points=[[30, 20, 1], [50, 25, 0]]).segment(image)
    alone, both = PointSegmenter(
        tiny_sam, points=[[[30, 20, 1]], [[30, 20, 1], [50, 25, 0]]]
    ).segment(image)
    boxes = BoxSegmenter(tiny_sam, boxes=[[5, 5, 60, 45], [0, 0, 80, 50]]).segment(image)

    assert rle.decode(one.rle).tolist() == rle.decode(both.rle).tolist()
    expected = predictor.predict(np.array([[30, 20], [50, 25]]), [1, 0], multimask_output=False)
    assert (rle.decode(one.rle) == expected[0][0]).mean() > 0.999
    assert one.predicted_iou == pytest.approx(float(expected[1][0]), abs=1e-5)
    assert one.point_coords == ((30, 20), (50, 25)) and one.extra == {"point_labels": [1, 0]}
    masks, scores, _ = predictor.predict(np.array([[30, 20]]), [1])
    assert (rle.decode(alone.rle) == masks[scores.argmax()]).mean() > 0.999
    assert [box.extra["input_box"] for box in boxes] == [[5, 5, 60, 45], [0, 0, 80, 50]]
    masks, scores, _ = predictor.predict(box=np.array([5, 5, 60, 45]))
    assert (rle.decode(boxes[0].rle) == masks[scores.argmax()]).mean() > 0.999
    assert 0 <= boxes[0].stability_score <= 1


@pytest.mark.parametrize(
    ("build", "prompts", "message"),
    [
        (PointSegmenter, None, "mode=points wants"),
        (PointSegmenter, [[3, 4]], "expected points="),
        (PointSegmenter, [[3, 4, 2]], "expected points="),
        (PointSegmenter, [3, 4, 1], "expected points="),
        (PointSegmenter, [["x", 4, 1]], "expected points="),
        (BoxSegmenter, [], "mode=boxes wants"),
        (BoxSegmenter, [[3, 4, 5]], "expected boxes="),
        (BoxSegmenter, [[9, 4, 5, 8]], "x1 > x0"),
    ],
)
def test_prompts_of_another_form_are_refused(
    tiny_sam: Sam, build: Any, prompts: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny_sam, prompts)


def test_a_prompt_outside_names_the_image(tmp_path: Path, folder: Path, tiny_sam: Sam) -> None:
    tiny_sam.set_img_size(64)
    files = SegmentFiles(images=str(folder), out=tmp_path / "out")
    with pytest.raises(InputError, match=r"b.jpg: a point .* outside .* 30 pixels wide"):
        files.run(PointSegmenter(tiny_sam, [[50, 20, 1]]), MADE_WITH)
    with pytest.raises(InputError, match=r"b.jpg: the box .* outside"):
        files.run(BoxSegmenter(tiny_sam, [[1, 2, 50, 20]]), MADE_WITH | {"mode": "boxes"})


def test_an_image_edited_without_another_length_and_one_without_its_picture_are_done_anew(
    tmp_path: Path, tiny_sam: Sam
) -> None:
    tiny_sam.set_img_size(64)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    image = tmp_path / "images" / "a.bmp"
    image.parent.mkdir()
    Image.fromarray(pixels).save(image)
    points = PointSegmenter(tiny_sam, [[20, 20, 1]])

    def run(overlay_px: int) -> int:
        files = SegmentFiles(images=str(image.parent), out=tmp_path / "out", overlay_px=overlay_px)
        return files.run(points, MADE_WITH).num_images

    assert (run(0), run(0)) == (1, 0)
    Image.fromarray(255 - pixels).save(image)
    assert (run(0), run(0)) == (1, 0)
    assert (run(100), run(100)) == (1, 0)
    assert (tmp_path / "out" / "overlays" / "a.jpg").is_file()


def test_the_command_segments_and_says_what_is_wrong(
    tmp_path: Path, folder: Path, tiny_sam_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: str) -> int:
        common = [f"checkpoint={tiny_sam_file}", f"images={folder}", "img_size=64"]
        return cli.run("segment", [*common, f"run_dir={tmp_path}/run", *more])

    assert run("mode=points", "points=[[10,12,1],[3,4,0]]") == 0
    assert "3 images, " in capsys.readouterr().out
    assert run("mode=points", "points=[[10,12,1],[3,4,0]]") == 0
    assert "3 images were done before" in capsys.readouterr().out
    half = ("mode=points", "points=[[10,12,1],[3,4,0]]", "precision=bf16-mixed")
    for said in ("3 images, ", "3 images were done before"):
        assert run(*half) == 0
        assert said in capsys.readouterr().out
    assert run("mode=boxes", "boxes=[[1,2,15,20]]", f"out={tmp_path}/boxes") == 0
    assert (tmp_path / "boxes/masks/more/c.json").is_file()
    for arguments, message in (
        ([], "say mode=points"),
        (["mode=points"], "points=[[x,y,label],...]"),
        (["mode=points", "points=[[1,2,1]]", "boxes=[[1,2,3,4]]"], "boxes= is of mode=boxes"),
        (["mode=points", "points=[[1,2]]"], "points=[[x,y,label],...]"),
        (["mode=boxes", "boxes=[[1,2,3]]"], "boxes=[[x0,y0,x1,y1],...]"),
        (
            ["mode=points", "points=[[1,2,1]]", "precision=8"],
            "one of 32-true, bf16-mixed, 16-mixed",
        ),
        (["mode=points", "points=[[900,2,1]]", f"out={tmp_path}/x"], "lies outside"),
        (["mode=points", "points=[[1,2,1]]", f"images={folder}/none"], "no such folder"),
    ):
        capsys.readouterr()
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
