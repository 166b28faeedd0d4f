"""Several points said at once about one object, before any mask was answered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sam_train.prompts.draws import PassDraws
from sam_train.prompts.points import Clicks, uniform_click


@dataclass(frozen=True, kw_only=True)
class SeveralPoints:
    """First prompts of more than one point, as users of a predictor give them.

    SAM's training gives one prompt, and every later point comes with the mask that was answered; points
    without one are never seen. A batch is all of one kind: a prompt of several points is clear, so that
    one mask is asked for and not three candidates.

    Attributes:
        prob: probability that a batch starts with several points.
        max_points: how many they are at most; drawn uniformly from 2 on.
        background_prob: probability that a point after the first lies beside the object.
        reach: how far from the object's box such a point may lie, in longer sides of that box.
    """

    prob: float
    max_points: int = 4
    background_prob: float = 0.3
    reach: float = 0.25

    def __post_init__(self) -> None:
        for name in ("prob", "background_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], got {getattr(self, name)}")
        if self.max_points < 2 or self.reach < 0:
            raise ValueError(
                f"expected max_points >= 2 and reach >= 0, got {self.max_points} and {self.reach}"
            )

    def num_points(self, generator: torch.Generator) -> int:
        """Draws how many points the objects of a batch start with: 1, or 2 to `max_points`."""
        share = torch.rand((), generator=generator)
        number = torch.randint(2, self.max_points + 1, (), generator=generator)
        return int(number) if share < self.prob else 1

    @torch.no_grad()
    def more_points(
        self, gt_masks: Tensor, boxes: Tensor, number: int, draws: PassDraws
    ) -> list[Clicks]:
        """Points after the first: in the object, or beside it.

        Args:
            gt_masks: (P, H, W) bool.
            boxes: (P, 4) xyxy edges on the same grid.
            number: how many.
            draws: of a pass that nothing else draws from.
        """
        beside = self._near(boxes, gt_masks.shape[-2:]) & ~gt_masks
        rows = torch.arange(len(gt_masks), device=gt_masks.device)
        clicks = []
        for _ in range(number):
            kind, place = draws.uniform(2).unbind(1)
            is_beside = (kind < self.background_prob)[:, None]
            coords = torch.where(
                is_beside,
                uniform_click(beside, None, place).coords,
                uniform_click(gt_masks, None, place).coords,
            )
            # An object that fills the grid has no place beside it: the truth under the point decides.
            x, y = coords.long().unbind(1)
            clicks.append(Clicks(coords, gt_masks[rows, y, x].long()))
        return clicks

    def _near(self, boxes: Tensor, size: torch.Size) -> Tensor:
        """The boxes, grown: (P, H, W) bool."""
        sides = boxes[:, 2:] - boxes[:, :2]
        margin = (self.reach * sides.amax(dim=1, keepdim=True)).clamp(min=1.0)
        low, high = boxes[:, :2] - margin, boxes[:, 2:] + margin
        columns, rows = (
            (places >= low[:, axis, None]) & (places < high[:, axis, None])
            for axis, places in (
                (0, torch.arange(size[1], device=boxes.device) + 0.5),
                (1, torch.arange(size[0], device=boxes.device) + 0.5),
            )
        )
        return rows[:, :, None] & columns[:, None, :]
