"""Boxes that somebody else's detector found, from a COCO results file."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import msgspec
import torch

from sam_train.data.source import UnusableSourceError
from sam_train.ops.boxes import xywh_to_xyxy
from sam_train.structures import DetectedBoxes

EXPECTED = 'expected a list of {"image_id": ..., "bbox": [x, y, w, h], "score": ...}, as COCO\'s results are'


class _Result(msgspec.Struct):
    """What is read of an entry; whatever else it holds (`category_id`, ...) is passed over."""

    image_id: int | str
    bbox: tuple[float, float, float, float]
    score: float


def read_coco_boxes(path: str | Path, *, min_score: float = 0.0) -> dict[int | str, DetectedBoxes]:
    """Reads a COCO results file.

    Args:
        path: of the JSON file.
        min_score: boxes of lower score are left out.

    Returns:
        By the file's own `image_id`, the boxes as xyxy edges in the original frame, best first; images
        without a box are not in it.

    Raises:
        FileNotFoundError: there is no such file.
        UnusableSourceError: it is no list of results, or one of them is no box: the message names it.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file of boxes: {path}; {EXPECTED}") from None
    try:
        results = msgspec.json.decode(data, type=list[_Result])
    except msgspec.DecodeError as error:  # not JSON, or an entry that is no result
        raise UnusableSourceError(f"{path}: {error}; {EXPECTED}") from None
    of_images: dict[int | str, list[_Result]] = defaultdict(list)
    for number, result in enumerate(results):
        if problem := _problem(result):
            raise UnusableSourceError(f"{path}: result {number} {problem}; {EXPECTED}")
        if result.score >= min_score:
            of_images[result.image_id].append(result)
    return {image: _detected(own) for image, own in of_images.items()}


def _problem(result: _Result) -> str | None:
    x, y, width, height = result.bbox
    if width <= 0 or height <= 0:
        return f"(image {result.image_id}) has a box without area, {[x, y, width, height]}"
    if not 0 <= result.score <= 1:
        return f"(image {result.image_id}) has the score {result.score}, not in [0, 1]"
    return None


def _detected(results: list[_Result]) -> DetectedBoxes:
    ranked = sorted(results, key=lambda result: -result.score)
    boxes = torch.tensor([result.bbox for result in ranked], dtype=torch.float32)
    return DetectedBoxes(xywh_to_xyxy(boxes), torch.tensor([result.score for result in ranked]))
