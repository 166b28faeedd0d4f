"""Average recall of mask proposals, by COCO's own code: how many objects are among the best n masks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam_train.structures import Annotation

MAX_PROPOSALS = (10, 100, 1000)
SIZES = ("all", "small", "medium", "large")
"""COCO's: an object is small below 32^2 pixels and large from 96^2 on."""


class AverageRecall:
    """Collects images, then measures: masks only, without classes, IoU 0.50 to 0.95."""

    def __init__(self) -> None:
        self._images: list[dict[str, int]] = []
        self._objects: list[dict[str, Any]] = []
        self._proposals: list[dict[str, Any]] = []

    @property
    def num_objects(self) -> int:
        return len(self._objects)

    def update(
        self,
        objects: Sequence[Annotation],
        proposals: Sequence[Annotation],
        scores: Sequence[float],
    ) -> None:
        """Takes an image.

        Args:
            objects: what there is.
            proposals: what was found.
            scores: of the proposals: of more than n, those of highest score count.
        """
        image = len(self._images) + 1
        height, width = next((own.rle["size"] for own in (*objects, *proposals)), (0, 0))
        self._images.append({"id": image, "height": height, "width": width})
        for into, given in ((self._objects, objects), (self._proposals, proposals)):
            into += [_entry(own, image, len(into) + i + 1) for i, own in enumerate(given)]
        if proposals:
            for entry, score in zip(self._proposals[-len(proposals) :], scores, strict=True):
                entry["score"] = float(score)

    def compute(self) -> dict[str, float]:
        """`average_recall@n` of all objects, `average_recall_small@n` and so on of those of a size.

        Sizes without an object are left out.
        """
        evaluation = COCOeval(self._coco(self._objects), self._coco(self._proposals), "segm")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(MAX_PROPOSALS)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
        recall = np.asarray(evaluation.eval["recall"])[:, 0]  # IoUs, sizes, numbers
        found = {}
        for s, size in enumerate(SIZES):
            for n, number in enumerate(MAX_PROPOSALS):
                own = recall[:, s, n]
                if (own > -1).all():
                    name = "average_recall" if size == "all" else f"average_recall_{size}"
                    found[f"{name}@{number}"] = float(own.mean())
        return found

    def _coco(self, annotations: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": self._images,
            "categories": [{"id": 1}],
            "annotations": annotations,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def _entry(annotation: Annotation, image: int, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "segmentation": dict(annotation.rle),
        "bbox": list(annotation.bbox),
        "area": annotation.area,
        "iscrowd": 0,
    }
