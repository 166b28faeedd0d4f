"""Boxes from a COCO results file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sam_train.data.coco_boxes import read_coco_boxes
from sam_train.data.source import UnusableSourceError


def result(image_id: object = 7, bbox: object = (2, 3, 10, 20), score: object = 0.5) -> dict:
    return {"image_id": image_id, "category_id": 1, "bbox": bbox, "score": score}


def written(path: Path, results: object) -> Path:
    path.write_text(json.dumps(results))
    return path


def test_boxes_come_by_image_as_edges_and_best_first(tmp_path: Path) -> None:
    results = [result(score=0.2), result(bbox=[0, 0, 4, 5], score=0.9), result(image_id="a.b")]

    found = read_coco_boxes(written(tmp_path / "boxes.json", results))

    assert found.keys() == {7, "a.b"}
    assert found[7].boxes.tolist() == [[0, 0, 4, 5], [2, 3, 12, 23]]
    assert found[7].scores.tolist() == pytest.approx([0.9, 0.2])


def test_boxes_below_a_score_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "boxes.json", [result(score=0.2), result(image_id=8, score=0.6)])

    assert read_coco_boxes(path, min_score=0.5).keys() == {8}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"annotations": []}, "Expected `array`, got `object`"),
        ([result(), {"image_id": 1, "bbox": [0, 0, 1, 1]}], "missing required field `score`"),
        ([result(bbox=[0, 0, 1])], "length 4"),
        ([result(bbox=[0, 0, 0, 4])], "result 0 (image 7) has a box without area"),
        ([result(), result(score=1.5)], "result 1 (image 7) has the score 1.5"),
        ([result(score="high")], "Expected `float`, got `str`"),
    ],
)
def test_what_is_no_result_is_named(tmp_path: Path, results: object, message: str) -> None:
    with pytest.raises(UnusableSourceError) as raised:
        read_coco_boxes(written(tmp_path / "boxes.json", results))

    assert message in str(raised.value)
    assert "boxes.json" in str(raised.value) and "expected a list of" in str(raised.value)


def test_a_file_that_breaks_off_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text('[{"image_id": 1, ')

    with pytest.raises(UnusableSourceError, match="truncated"):
        read_coco_boxes(path)
    with pytest.raises(FileNotFoundError, match="no such file of boxes"):
        read_coco_boxes(tmp_path / "none.json")
