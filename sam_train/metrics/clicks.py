"""How good the masks are after 1, 2, 3 ... clicks, and how many clicks a good one takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

REPORTED_CLICKS = 9
"""`mean_iou@k` is reported up to this click (SAM's protocol)."""
NOC_CAP = 20
"""Clicks after which an object counts as failed, with this number of clicks (RITM's protocol)."""
NOC_IOUS = {"85": 0.85, "90": 0.90}

SMALL_BELOW_PX, MEDIUM_BELOW_PX = 32**2, 96**2
"""COCO's bounds on the area of small and medium objects, pixels of the original image."""
SIZE_SUFFIXES = ("", "_small", "_medium", "_large")


class ClickCurves(NamedTuple):
    """What a simulated annotator measured on P objects.

    Attributes:
        ious: (P, K) float, with the ground truth after each of K clicks; NaN where an object was
            finished and not clicked on.
        predicted_ious: (P, K) float, what the model thought of the same masks.
        oracle_ious: (P,) float, of the best of the first click's candidates.
        box_ious: (P,) float, for the tight box alone; NaN where it was not asked for.
        areas: (P,) int64, pixels of the ground truth at original resolution.
        objects: (P,) int64, indices of the objects' annotations in their record.
    """

    ious: Tensor
    predicted_ious: Tensor
    oracle_ious: Tensor
    box_ious: Tensor
    areas: Tensor
    objects: Tensor


def number_of_clicks(ious: Tensor, target: float) -> Tensor:
    """Clicks until the IoU first reaches the target, `NOC_CAP` if it never does.

    Args:
        ious: (P, K) float, NaN where not clicked.
        target: IoU to reach.

    Returns:
        (P,) int64.
    """
    reached = ious >= target
    first = reached.int().argmax(dim=1) + 1
    return torch.where(reached.any(dim=1), first, NOC_CAP)


def size_class(areas: Tensor) -> Tensor:
    """0 for small, 1 for medium, 2 for large objects; areas in pixels of the original image."""
    return (areas >= SMALL_BELOW_PX).long() + (areas >= MEDIUM_BELOW_PX).long()


class ClickMetrics:
    """Collects curves into means over masks: of all, and by object size.

    The state is one tensor of sums, so that ranks merge theirs by adding `totals`.

    `mean_iou@k` counts the candidate of highest predicted IoU, `oracle_mean_iou@1` the best of three.
    `noc@85`, `noc@90` and `failures@90` need the 20 clicks of their protocol and are left out of shorter
    runs. `iou_prediction_mae` is how far the predicted IoU is from the true one, over the reported
    clicks of all masks. A size of which there is no object is left out.

    Of several sources each has its own means, `SOURCE/NAME`, and `NAME` is the mean of these: a set of
    many masks does not drown the others (the paper's way with its 23).

    Args:
        num_clicks: K, clicks made on each object (unless it was finished before).
        sources: names of the data sets that are told apart.
    """

    def __init__(self, num_clicks: int, sources: Sequence[str] = ()) -> None:
        if num_clicks < 1:
            raise ValueError(f"num_clicks is 1 or more, got {num_clicks}")
        self.sources = tuple(sources)
        self.num_reported = min(num_clicks, REPORTED_CLICKS)
        self.has_noc = num_clicks >= NOC_CAP
        shape = max(1, len(self.sources)), len(SIZE_SUFFIXES), len(self.names), 2
        self.totals = torch.zeros(shape, dtype=torch.float64)
        """(sources, sizes, names, 2): sum and number of values; ranks add theirs up."""

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics' names, without the suffix of the object size."""
        clicks = [f"mean_iou@{k + 1}" for k in range(self.num_reported)]
        noc = [*(f"noc@{name}" for name in NOC_IOUS), "failures@90"] if self.has_noc else []
        return (*clicks, "oracle_mean_iou@1", "box_mean_iou", *noc, "iou_prediction_mae")

    @property
    def num_masks(self) -> int:
        """How many masks were measured."""
        return int(self.totals[:, 0, 0, 1].sum())

    def update(self, curves: ClickCurves, source: str = "") -> None:
        """Adds the objects of one image of `source`, which counts only where several are told apart."""
        self._add(self._values(curves), curves.areas, source)

    def _add(self, values: Tensor, areas: Tensor, source: str) -> None:
        """Adds a row an object, (P, names), and its area."""
        values = values.double().cpu()
        sizes = torch.nn.functional.one_hot(size_class(areas.cpu()), 3).double()
        weights = torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1).T
        sums = weights @ values.nan_to_num(0.0)
        counts = weights @ values.isfinite().double()
        row = self.sources.index(source) if self.sources else 0
        self.totals[row] += torch.stack([sums, counts], dim=-1)

    def _values(self, curves: ClickCurves) -> Tensor:
        """One column per name: (P, names), NaN where an object has no such value."""
        ious = curves.ious[:, : self.num_reported]
        predicted = curves.predicted_ious[:, : self.num_reported]
        columns = [*ious.unbind(1), curves.oracle_ious, curves.box_ious]
        if self.has_noc:
            columns += [number_of_clicks(curves.ious, target) for target in NOC_IOUS.values()]
            columns += [~(curves.ious >= NOC_IOUS["90"]).any(dim=1)]
        columns += [(predicted - ious).abs().nanmean(dim=1)]
        return torch.stack([column.float() for column in columns], dim=1)

    def merge(self, other: ClickMetrics) -> None:
        """Adds what another instance of the same protocol has collected."""
        if (other.names, other.sources) != (self.names, self.sources):
            raise ValueError(
                "expected metrics of the same protocol and sources, got "
                f"{other.names} of {other.sources} for {self.names} of {self.sources}"
            )
        self.totals = self.totals + other.totals

    def compute(self) -> dict[str, float]:
        """The means so far, by name; `NAME_small`, `NAME_medium` and `NAME_large` by object size."""
        means = self.totals[..., 0] / self.totals[..., 1]
        scores = self._named(means.nanmean(dim=0))
        if len(self.sources) > 1:
            for source, of_source in zip(self.sources, means, strict=True):
                scores |= self._named(of_source, f"{source}/")
        return scores

    def _named(self, means: Tensor, prefix: str = "") -> dict[str, float]:
        return {
            prefix + name + suffix: float(means[size, column])
            for size, suffix in enumerate(SIZE_SUFFIXES)
            for column, name in enumerate(self.names)
            if not means[size, column].isnan()
        }
