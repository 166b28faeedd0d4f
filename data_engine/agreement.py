"""How far two annotators agree who labelled the same images on their own (SAM, section 5: 85-91% IoU)."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from data_engine import mask_shapes
from data_engine.mask_store.store import Store

SAME_OBJECT_IOU = 0.5
"""Two masks show one object if their IoU is above: then no other has as much of either."""
PAPER_RANGE = (0.85, 0.91)


class Agreement(NamedTuple):
    """Two annotators' masks side by side, matched one to one (Hungarian) by IoU.

    Attributes:
        annotators: their names, sorted.
        num_images: that both labelled.
        num_masks: of each.
        num_common: objects that both drew.
        share_common: of all their masks, those of objects that both drew (F1), in [0, 1].
        mean_iou: of the objects that both drew; NaN where there is none.
        ious: all of these.
    """

    annotators: tuple[str, str]
    num_images: int
    num_masks: tuple[int, int]
    num_common: int
    share_common: float
    mean_iou: float
    ious: np.ndarray


def agreements(store: Store, round_number: int) -> list[Agreement]:
    """Each two annotators who have done the same images of a round for comparison, by their names."""
    done: dict[str, dict[str, str]] = defaultdict(dict)
    for task in store.tasks(round=round_number, stage="audit", state="done"):
        if task.payload.get("pair"):
            done[task.image_id][str(task.annotator)] = task.id
    common: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for by_annotator in done.values():
        for one, other in combinations(sorted(by_annotator), 2):
            common[one, other].append((by_annotator[one], by_annotator[other]))
    return [_agreement(store, pair, tasks) for pair, tasks in sorted(common.items())]


def _agreement(store: Store, pair: tuple[str, str], tasks: list[tuple[str, str]]) -> Agreement:
    num_masks, found = np.zeros(2, int), [np.zeros(0)]
    for task_ids in tasks:
        ones, others = ([own.rle for own in store.masks(task_id=name)] for name in task_ids)
        num_masks += len(ones), len(others)
        found.append(matched_ious(mask_shapes.ious(ones, others)))
    ious = np.concatenate(found)
    return Agreement(
        annotators=pair,
        num_images=len(tasks),
        num_masks=(int(num_masks[0]), int(num_masks[1])),
        num_common=len(ious),
        share_common=2 * len(ious) / max(int(num_masks.sum()), 1),
        mean_iou=float(ious.mean()) if len(ious) else float("nan"),
        ious=ious,
    )


def matched_ious(ious: np.ndarray) -> np.ndarray:
    """Of a table (K, M) of IoUs, those of the pairs of one object when no mask is in two pairs."""
    # What is no common object must not be traded for one: it counts nothing in the sum.
    rows, columns = linear_sum_assignment(np.where(ious > SAME_OBJECT_IOU, ious, 0), maximize=True)
    found = ious[rows, columns]
    return found[found > SAME_OBJECT_IOU]
