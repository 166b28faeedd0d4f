"""What a round's report tells, and the same as plain values for `report.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_engine.agreement import Agreement
from data_engine.audit import AuditResult
from data_engine.mask_sample import Shapes
from data_engine.records import Model
from data_engine.round_numbers import RoundNumbers, Work, is_simulated

QUANTILES = {"min": 0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1}


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report tells.

    Attributes:
        rounds: all until this one, which is the last.
        shapes: of a sample of its masks.
        audit: of its automatic masks; None where nobody has looked.
        agreements: of annotators who labelled the same images.
        models: all until then, without detectors, the first ones first.
    """

    rounds: tuple[RoundNumbers, ...]
    shapes: Shapes
    audit: AuditResult | None
    agreements: tuple[Agreement, ...]
    models: tuple[Model, ...]

    @property
    def now(self) -> RoundNumbers:
        """The round it is about."""
        return self.rounds[-1]

    @property
    def annotators(self) -> tuple[str, ...]:
        """All who did anything until then, sorted."""
        names = {name for own in self.rounds if own.work for name in own.work.annotators}
        names.update(self.audit.annotators if self.audit else ())
        names.update(name for own in self.agreements for name in own.annotators)
        return tuple(sorted(names))

    @property
    def is_simulated(self) -> bool:
        """Whether any of them was simulated."""
        return is_simulated(self.annotators)

    @property
    def is_audit_simulated(self) -> bool:
        """Whether any of those who looked at its masks again was."""
        return self.audit is not None and is_simulated(self.audit.annotators)

    @property
    def is_agreement_simulated(self) -> bool:
        """Whether any of those who were compared was."""
        return any(is_simulated(own.annotators) for own in self.agreements)

    @property
    def are_models_simulated(self) -> bool:
        """Whether any of the models has learnt from masks of a simulated annotator."""
        first = min((own.round.number for own in self.rounds if own.is_simulated), default=None)
        return first is not None and any(
            own.round is not None and own.round >= first for own in self.models
        )

    @property
    def share_automatic_so_far(self) -> float | None:
        """Of the masks of all rounds, the share that nobody drew or changed."""
        num_masks = sum(own.num_masks for own in self.rounds)
        return sum(own.num_ready_made for own in self.rounds) / num_masks if num_masks else None


def as_json(report: Report) -> dict[str, Any]:
    """Plain values; None for what there is not."""
    now = report.now
    content = {
        **_row(now),
        "share_automatic_so_far": report.share_automatic_so_far,
        "simulated": report.is_simulated,
        "models_simulated": report.are_models_simulated,
        "annotators": list(report.annotators),
        "work": None if now.work is None else _work(now.work),
        "shapes": {
            name: quantiles(values)
            for name, values in zip(Shapes._fields, report.shapes, strict=True)
        },
        "measured_images": len(report.shapes.coverages),
        "rejects": dict(now.rejects),
        "missing_shards": list(now.missing),
        "audit": None if report.audit is None else _without_ious(report.audit),
        "agreements": [_without_ious(own) for own in report.agreements],
        "models": [
            {
                "id": own.id,
                "round": own.round,
                "promoted": own.promoted,
                "metrics": dict(own.metrics),
            }
            for own in report.models
        ],
        "rounds": [_row(own) for own in report.rounds],
        "config": dict(now.round.config),
    }
    return _numbers_only(content)


def _row(own: RoundNumbers) -> dict[str, Any]:
    return {
        "round": own.round.number,
        "stage": own.round.stage,
        "state": own.round.state,
        "model": own.round.model_id,
        "simulated": own.is_simulated,
        "images": own.num_images,
        "masks": own.num_masks,
        "masks_per_image": own.masks_per_image,
        "share_automatic": own.share_automatic,
        "seconds_per_mask": own.seconds_per_mask,
        "seconds_per_mask_all_in": own.seconds_per_mask_all_in,
        "clicks_per_mask": own.clicks_per_mask,
    }


def _work(work: Work) -> dict[str, Any]:
    return {
        "tasks_done": work.num_done,
        "tasks_open": work.num_open,
        "drawn": work.num_drawn,
        "corrected": work.num_corrected,
        "passed": work.num_passed,
        "struck_out": work.num_struck_out,
        "seconds_per_mask": quantiles(work.mask_seconds),
        "clicks_per_mask": quantiles(work.mask_clicks),
        "seconds_per_image": quantiles(work.image_seconds),
        "hours": float(work.image_seconds.sum()) / 3600,
        "events": dict(work.events),
    }


def _without_ious(own: AuditResult | Agreement) -> dict[str, Any]:
    told = {name: value for name, value in own._asdict().items() if name != "ious"}
    return told | {"simulated": is_simulated(own.annotators)}


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Some quantiles and the mean; None of no values."""
    if not len(values):
        return None
    found = {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
    return found | {"mean": float(values.mean())}


def _numbers_only(value: Any) -> Any:
    """With None for floats that are none: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {str(name): _numbers_only(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers_only(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
