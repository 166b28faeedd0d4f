"""What the engine is to do: a list of steps, `conf/plan/*.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

HUMAN = ("assisted", "semi_automatic")
STAGES = (*HUMAN, "automatic")
PARENT = "parent"
"""As a checkpoint to start from: the model that the round works with."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A round of the plan and the training after it.

    Attributes:
        stage: assisted, semi_automatic or automatic.
        num_images: new images for it; None: all that are left.
        settings: of its stage, those that are otherwise than `stages` has them: thresholds, say.
        retrain: whether to train on all masks afterwards; None: after a stage of people.
        recipe: of `conf/experiment/`, for that training.
        overrides: `name=value` of sam-train for it.
        checkpoint: what it starts from: `parent`, a checkpoint, or None for random weights.
        detector_recipe, detector_overrides: the same of the box detector that a semi-automatic round has.
        detector_boxes: a COCO results file whose boxes take that detector's place.
        human_weight: how many times as often as automatic ones images with people's masks are drawn.
    """

    stage: str
    num_images: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    retrain: bool | None = None
    recipe: str = "retrain"
    overrides: Sequence[str] = ()
    checkpoint: str | None = PARENT
    detector_recipe: str = "detector"
    detector_overrides: Sequence[str] = ()
    detector_boxes: str | None = None
    human_weight: float = 10.0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"a step's stage is one of {', '.join(STAGES)}, got {self.stage!r}")
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"num_images is 1 or more, or null for all, got {self.num_images}")
        if not self.human_weight > 0:
            raise ValueError(f"human_weight is above 0, got {self.human_weight}")

    @property
    def is_human(self) -> bool:
        """Whether people, or who plays them, make its masks."""
        return self.stage in HUMAN

    @property
    def trains(self) -> bool:
        """Whether a training follows it."""
        return self.is_human if self.retrain is None else self.retrain


def read_steps(plan: Mapping[str, Any]) -> tuple[Step, ...]:
    """The steps of a plan's node; what a step does not say is as in the plan's `defaults`.

    Raises:
        ValueError: there is none, or one is not as a step should be; the message counts from 1.
    """
    steps, defaults = plan.get("steps"), plan.get("defaults") or {}
    if not isinstance(steps, list) or not steps:
        raise ValueError("plan.steps is a list of steps, got none: see conf/plan for examples")
    if not isinstance(defaults, Mapping):
        raise ValueError(f"plan.defaults is what steps do not say, as name: value; got {defaults}")
    made: list[Step] = []
    for number, step in enumerate(steps, 1):
        try:
            made.append(_read_step(step, defaults))
            _check_boxes(made)
        except ValueError as error:
            raise ValueError(f"plan.steps, step {number}: {error}") from None
    return tuple(made)


def _read_step(step: Any, defaults: Mapping[str, Any]) -> Step:
    if not isinstance(step, Mapping):
        raise ValueError(f"a step is {{stage: assisted, num_images: 100}}, say; got {step}")
    values, known = {**defaults, **step}, {one.name for one in fields(Step)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"unknown {', '.join(unknown)}; a step has {', '.join(sorted(known))}")
    try:
        return msgspec.convert(values, Step)
    except msgspec.ValidationError as error:
        raise ValueError(explained(error)) from None


def _check_boxes(steps: Sequence[Step]) -> None:
    """A detector learns from what the first stage made."""
    *before, last = steps
    if last.stage != "semi_automatic" or last.detector_boxes is not None:
        return
    if not any(step.stage == "assisted" for step in before):
        raise ValueError(
            "the box detector of a semi_automatic step is trained on the masks of assisted ones, and none "
            "is before it: put one there, or name boxes with detector_boxes: FILE"
        )


def explained(error: msgspec.ValidationError) -> str:
    """`seed: expected int, got str` of msgspec's "Expected `int`, got `str` - at `$.seed`"."""
    said, _, place = str(error).replace("`", "").partition(" - at $.")
    return f"{place}: {said[:1].lower()}{said[1:]}" if place else said
