import numpy as np

from sam_train.evaluation.proposals import nearest
from sam_train.ops import rle
from sam_train.structures import Annotation


def box(x0: int, x1: int, score: float = 1.0) -> Annotation:
    mask = np.zeros((20, 40), bool)
    mask[5:15, x0:x1] = True
    code = rle.encode(mask)
    return Annotation(
        id=x0, rle=code, bbox=rle.bbox(code), area=float(mask.sum()), predicted_iou=score,
        stability_score=score,
    )  # fmt: skip


def test_each_object_is_shown_with_the_proposal_that_covers_it_best() -> None:
    objects = [box(0, 10), box(20, 30), box(36, 40)]
    found = [box(0, 5), box(1, 10, 0.5), box(18, 31)]

    assert [own.id for own in nearest(objects, found)] == [1, 18]
    assert nearest(objects, []) == nearest([], found) == []


def test_proposals_beyond_those_that_recall_counts_are_not_shown() -> None:
    poor_but_exact = box(0, 10, 0.1)

    shown = nearest([box(0, 10)], [box(0, 6, 0.9)] * 1000 + [poor_but_exact])

    assert [own.area for own in shown] == [60.0]
