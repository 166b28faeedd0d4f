"""What a simulated annotator is like: `conf/annotator/simulated.yaml`, which has a reason for each figure."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_engine.human_noise import Eye, Hand
from data_engine.time_model import TimeModel


@dataclass(frozen=True, kw_only=True)
class Standards:
    """IoUs, as the eye sees them.

    Attributes:
        good_enough: accepts a mask from here on.
        acceptable: from here on hands a mask in when it stops trying; else gives the object up.
        wrong_below: strikes out a ready-made mask that is worse.
        noticeable: a click is of use if it makes the mask better by more.
        worse: a click that makes it worse than the best so far by more is undone.
    """

    good_enough: float = 0.90
    acceptable: float = 0.75
    wrong_below: float = 0.50
    noticeable: float = 0.01
    worse: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.wrong_below <= self.acceptable <= self.good_enough <= 1:
            raise ValueError(
                "expected 0 < wrong_below <= acceptable <= good_enough <= 1, got "
                f"{self.wrong_below}, {self.acceptable}, {self.good_enough}"
            )
        if self.noticeable < 0 or self.worse < 0:
            raise ValueError("noticeable and worse are 0 or more")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When it stops.

    Attributes:
        max_clicks: on one object.
        useless_clicks: in a row that mend nothing, before it takes the brush.
        move_on_after_s: on one mask, where the task does not say; None: never.
        max_image_s: after which no further object of an image is begun.
    """

    max_clicks: int = 9
    useless_clicks: int = 3
    move_on_after_s: float | None = 30.0
    max_image_s: float = 650.0

    def __post_init__(self) -> None:
        if self.max_clicks < 1 or self.useless_clicks < 1:
            raise ValueError("max_clicks and useless_clicks are 1 or more")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Which objects it does not label: each for its own reason, with a probability of its own.

    Attributes:
        leave_out_prob: of any object.
        leave_out_small_prob, small_below_px: of one whose area is a square of a smaller side, screen pixels.
        leave_out_hidden_prob, hidden_below_levels: of one that differs less from what is round it, grey levels.
    """

    leave_out_prob: float = 0.02
    leave_out_small_prob: float = 0.3
    small_below_px: float = 12.0
    leave_out_hidden_prob: float = 0.3
    hidden_below_levels: float = 6.0

    def __post_init__(self) -> None:
        for name in ("leave_out_prob", "leave_out_small_prob", "leave_out_hidden_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], got {getattr(self, name)}")

    def leave_out(self, side_px: float, contrast_levels: float) -> float:
        """The probability that an object is left out, for whichever reason.

        Args:
            side_px: of a square of its area, screen pixels.
            contrast_levels: between it and what is round it.
        """
        seen = 1 - self.leave_out_prob
        if side_px < self.small_below_px:
            seen *= 1 - self.leave_out_small_prob
        if contrast_levels < self.hidden_below_levels:
            seen *= 1 - self.leave_out_hidden_prob
        return 1 - seen


@dataclass(frozen=True, kw_only=True)
class AnnotatorSettings:
    """A person, as far as it matters here.

    Attributes:
        seed: with a task's id it gives all that is random about that task.
        box_prob: share of objects that are begun with a box, not a click.
        screen_px: longest side of an image on the screen.
    """

    seed: int = 0
    box_prob: float = 0.2
    screen_px: float = 1000.0
    standards: Standards = field(default_factory=Standards)
    patience: Patience = field(default_factory=Patience)
    attention: Attention = field(default_factory=Attention)
    eye: Eye = field(default_factory=Eye)
    hand: Hand = field(default_factory=Hand)
    time: TimeModel = field(default_factory=TimeModel)

    def __post_init__(self) -> None:
        if not 0 <= self.box_prob <= 1:
            raise ValueError(f"box_prob is a probability in [0, 1], got {self.box_prob}")
