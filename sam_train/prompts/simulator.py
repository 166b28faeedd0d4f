"""Plays the annotator: rounds of prompts on objects whose masks are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sam_train.ops.boxes import masks_to_boxes
from sam_train.ops.masks import is_empty
from sam_train.prompts.boxes import gaussian_box_shifts, shift_boxes, uniform_box_shifts
from sam_train.prompts.draws import PassDraws, PromptDraws
from sam_train.prompts.masks import best_candidate, chosen_logits, given_mask_logits
from sam_train.prompts.points import Clicks, center_click, uniform_click
from sam_train.prompts.several_points import SeveralPoints
from sam_train.structures import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    PADDING,
    MaskPrediction,
    Prompts,
)

REFERENCE_SIDE_PX = 1024
"""The published model input; the limit on box noise is stated in its pixels."""

Decode = Callable[[Prompts, bool], MaskPrediction]
"""Answers `(prompts, multimask_output)`; takes the prompts from the grid's frame to its own."""


class Plan(NamedTuple):
    """What happens in each pass over a batch; the same for all its objects, on all ranks.

    Attributes:
        new_prompt: a pass each: whether something is said that was not said before. The first is True;
            a False pass only feeds the last answer back.
        mask_first: the first prompt is a mask brought along.
        num_first_points: above 1 where the first prompt is so many points at once.
    """

    new_prompt: tuple[bool, ...]
    mask_first: bool = False
    num_first_points: int = 1


class Interaction(NamedTuple):
    """One pass: what was asked and what came back.

    Attributes:
        prompts: in the frame of the ground truth's grid; `mask_inputs` at the model's low resolution.
        prediction: the model's answer, with its graph.
        chosen: (P,) the candidate of highest predicted IoU, the one the next pass builds on.
        pass_index: 0 for the first.
        new_click: False where the pass only feeds the last answer back.
    """

    prompts: Prompts
    prediction: MaskPrediction
    chosen: Tensor
    pass_index: int
    new_click: bool


class _ClickNumbers(NamedTuple):
    """What is drawn for one click on each of P objects.

    Attributes:
        uniform: (P,) in [0, 1), of places drawn from the whole error; None if no click is.
        is_center: (P,) bool, at the centre of the error instead.
    """

    uniform: Tensor | None
    is_center: Tensor


@dataclass(frozen=True, kw_only=True)
class PromptSimulator:
    """A first prompt from the ground truth, then clicks on what the model got wrong.

    Works in the frame of the ground-truth masks it is handed, whatever their resolution, and on their
    device. One object of this class serves training (`rollout`); evaluation and simulated annotators
    use its steps (`first_prompts`, `correct`) one by one. The defaults are those of SAM's appendix A.

    Attributes:
        mask_prob: probability that a batch starts from masks (SAM 2's mask prompts).
        box_prob: otherwise, probability that an object's first prompt is a box and not a click. An
            empty object gets a (background) click in any case: it has no box.
        box_sampling: `gaussian` moves each coordinate by a fraction of the side (SAM), `uniform` by any
            distance up to the limit (MedSAM).
        box_noise: standard deviation of the Gaussian, as a fraction of the box side.
        max_box_noise_px: the furthest a coordinate moves, in pixels of a 1024 px model input; scaled to
            the grid by its longest side.
        click_sampling: `uniform` within the error (training), or the `center` of the larger error (the
            evaluation protocols).
        center_prob: with `uniform`, probability that a click is at the center all the same, where people
            like to click and the evaluation does.
        exclude_clicked: never click a pixel twice (RITM's rule; SAM 2's has none).
        corrections_from_gt: probability that a corrective click is drawn from the whole object, as if
            nothing had been predicted (SAM 2).
        num_corrections: clicks after the first prompt.
        num_extra_passes: passes without a new click: one last, any others at random places among the
            clicks.
        several: starts some batches with several points at once; None, as SAM, starts none.
    """

    mask_prob: float = 0.0
    box_prob: float = 0.5
    box_sampling: Literal["gaussian", "uniform"] = "gaussian"
    box_noise: float = 0.1
    max_box_noise_px: float = 20.0
    click_sampling: Literal["uniform", "center"] = "uniform"
    center_prob: float = 0.0
    exclude_clicked: bool = False
    corrections_from_gt: float = 0.0
    num_corrections: int = 8
    num_extra_passes: int = 2
    several: SeveralPoints | None = None

    def __post_init__(self) -> None:
        for name in ("mask_prob", "box_prob", "center_prob", "corrections_from_gt"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], got {getattr(self, name)}")
        for name in ("box_noise", "max_box_noise_px", "num_corrections", "num_extra_passes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is 0 or more, got {getattr(self, name)}")
        if self.num_extra_passes > self.num_corrections + 1:
            raise ValueError(
                "expected at most one extra pass per correction and one last, got "
                f"num_extra_passes={self.num_extra_passes} for {self.num_corrections} corrections"
            )
        for name, choices in (
            ("box_sampling", ("gaussian", "uniform")),
            ("click_sampling", ("uniform", "center")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {choices}, got {getattr(self, name)!r}")

    def plan(self, generator: torch.Generator) -> Plan:
        """Draws what the passes of one batch will be.

        An extra pass takes its place before one of the corrective clicks; SAM's 8 corrections and 2
        extra passes make 11 passes with the first. Give every rank a generator of the same state, so
        that all run the same passes (and gradients meet).

        Args:
            generator: on the CPU.
        """
        num_inserted = max(self.num_extra_passes - 1, 0)
        order = torch.randperm(self.num_corrections, generator=generator)
        inserted_before = set(order[:num_inserted].tolist())
        passes = [True]
        for click in range(self.num_corrections):
            passes += [False, True] if click in inserted_before else [True]
        passes += [False] * min(self.num_extra_passes, 1)
        mask_first = bool(torch.rand((), generator=generator) < self.mask_prob)
        num_points = 1 if self.several is None else self.several.num_points(generator)
        return Plan(tuple(passes), mask_first, 1 if mask_first else num_points)

    def rollout(
        self,
        decode: Decode,
        gt_masks: Tensor,
        boxes: Tensor | None,
        draws: PromptDraws,
        plan: Plan,
        to_masks: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Interaction]:
        """Runs the passes of `plan`; the model may be trained on each as it is yielded.

        Three candidates are asked for in the first pass (a click or a box is one prompt, which may be
        ambiguous), a single one afterwards and where the first prompt is several points.

        Args:
            decode: the model, from prompts in the grid's frame.
            gt_masks: (P, H, W) bool.
            boxes: (P, 4) xyxy edges on the same grid; None takes the masks' own tight boxes.
            draws: the random numbers of these P objects.
            plan: from `plan`.
            to_masks: takes the chosen logits (P, h, w) to the grid as (P, H, W) bool; by default a
                threshold at 0, for logits that are on the grid already.
        """
        num_points = plan.num_first_points
        prompts = self.first_prompts(
            gt_masks, boxes, draws, mask_first=plan.mask_first, num_points=num_points
        )
        for index, is_new in enumerate(plan.new_prompt):
            prediction = decode(prompts, index == 0 and num_points == 1)
            chosen = best_candidate(prediction)
            yield Interaction(prompts, prediction, chosen, index, is_new)
            if index + 1 == len(plan.new_prompt):
                return
            logits = chosen_logits(prediction, chosen)
            if plan.new_prompt[index + 1]:
                grid_logits = logits[:, 0]
                pred_masks = grid_logits > 0 if to_masks is None else to_masks(grid_logits)
                prompts = self.correct(prompts, gt_masks, pred_masks, draws.for_pass(index + 1))
            prompts = prompts._replace(mask_inputs=logits)

    @torch.no_grad()
    def first_prompts(
        self,
        gt_masks: Tensor,
        boxes: Tensor | None,
        draws: PromptDraws,
        *,
        mask_first: bool = False,
        num_points: int = 1,
    ) -> Prompts:
        """What is said before the model has answered anything.

        Args:
            gt_masks: (P, H, W) bool.
            boxes: (P, 4) xyxy of the same grid, or None for the tight boxes of the masks.
            draws: the random numbers of these P objects.
            mask_first: give the masks themselves, with no points.
            num_points: above 1, give so many points at once (see `several`), and no boxes.

        Returns:
            Prompts of two points each: a click and padding, or the corners of a box; with `num_points`,
            of so many clicks and padding.
        """
        first = draws.for_pass(0)
        if mask_first:
            none = torch.zeros(len(gt_masks), 2, 2, device=gt_masks.device)
            labels = torch.full(none.shape[:2], PADDING, device=gt_masks.device)
            return Prompts(none, labels, given_mask_logits(gt_masks))
        numbers = self._click_numbers(first)
        if self.box_prob == 0 and num_points == 1:
            return click_prompts(self._place(gt_masks, None, None, numbers))
        tight = masks_to_boxes(gt_masks) if boxes is None else boxes
        if num_points > 1:
            assert self.several is not None
            prompts = click_prompts(self._place(gt_masks, None, None, numbers))
            # No pass is numbered -1: what else is drawn stays as it is.
            more = draws.for_pass(-1)
            for clicks in self.several.more_points(gt_masks, tight, num_points - 1, more):
                prompts = add_clicks(prompts, clicks)
            return prompts
        height, width = gt_masks.shape[-2:]
        as_boxes = box_prompts(self._jitter(tight, first, (height, width)))
        is_box = (first.uniform(1) < self.box_prob) & ~is_empty(gt_masks)[:, None]
        # Centres are costly: none where a box is given.
        numbers = numbers._replace(is_center=numbers.is_center & ~is_box[:, 0])
        as_clicks = click_prompts(self._place(gt_masks, None, None, numbers))
        return Prompts(
            torch.where(is_box[..., None], as_boxes.point_coords, as_clicks.point_coords),
            torch.where(is_box, as_boxes.point_labels, as_clicks.point_labels),
        )

    def correct(
        self, prompts: Prompts, gt_masks: Tensor, pred_masks: Tensor, draws: PassDraws
    ) -> Prompts:
        """Adds the click that mends the prediction; what else was said stays.

        Args:
            prompts: what was said so far, in the frame of the masks.
            gt_masks: (P, H, W) bool.
            pred_masks: (P, H, W) bool.
            draws: the random numbers of the coming pass.
        """
        return add_clicks(prompts, self.click(gt_masks, pred_masks, prompts, draws))

    @torch.no_grad()
    def click(
        self,
        gt_masks: Tensor,
        pred_masks: Tensor | None,
        prompts: Prompts | None,
        draws: PassDraws,
    ) -> Clicks:
        """Where to click next.

        Args:
            gt_masks: (P, H, W) bool.
            pred_masks: (P, H, W) bool, or None where nothing was predicted yet.
            prompts: what was said so far, for the pixels clicked already.
            draws: the random numbers of the coming pass.
        """
        exclude = None
        if self.exclude_clicked and prompts is not None:
            is_click = (prompts.point_labels == FOREGROUND) | (prompts.point_labels == BACKGROUND)
            exclude = prompts.point_coords.where(is_click[..., None], -1.0)
        if pred_masks is not None and self.corrections_from_gt > 0:
            forgets = draws.uniform(1)[..., None] < self.corrections_from_gt
            pred_masks = pred_masks & ~forgets
        return self._place(gt_masks, pred_masks, exclude, self._click_numbers(draws))

    def _click_numbers(self, draws: PassDraws) -> _ClickNumbers:
        """Draws what a click needs; recorded runs hold to the order of the columns."""
        everywhere = torch.ones(len(draws.state), dtype=torch.bool, device=draws.state.device)
        if self.click_sampling == "center":
            return _ClickNumbers(None, everywhere)
        uniform = draws.uniform(1)[:, 0]
        if self.center_prob == 0:
            return _ClickNumbers(uniform, ~everywhere)
        return _ClickNumbers(uniform, draws.uniform(1)[:, 0] < self.center_prob)

    def _place(
        self,
        gt_masks: Tensor,
        pred_masks: Tensor | None,
        exclude: Tensor | None,
        numbers: _ClickNumbers,
    ) -> Clicks:
        """Clicks at the drawn places; where neither is asked for, at pixel (0, 0)."""
        if numbers.uniform is None:
            coords = torch.zeros(len(gt_masks), 2, device=gt_masks.device)
            labels = torch.zeros(len(gt_masks), dtype=torch.long, device=gt_masks.device)
        else:
            coords, labels = uniform_click(gt_masks, pred_masks, numbers.uniform, exclude)
            if self.center_prob == 0:
                return Clicks(coords, labels)
        rows = numbers.is_center
        centers = center_click(
            gt_masks[rows],
            None if pred_masks is None else pred_masks[rows],
            None if exclude is None else exclude[rows],
        )
        return Clicks(
            coords.index_put((rows,), centers.coords), labels.index_put((rows,), centers.labels)
        )

    def _jitter(self, boxes: Tensor, draws: PassDraws, size: tuple[int, int]) -> Tensor:
        limit_px = self.max_box_noise_px * max(size) / REFERENCE_SIDE_PX
        if self.box_sampling == "uniform":
            shifts = uniform_box_shifts(boxes, draws.uniform(4), max_shift_px=limit_px)
        else:
            shifts = gaussian_box_shifts(
                boxes, draws.normal(4), sigma=self.box_noise, max_shift_px=limit_px
            )
        return shift_boxes(boxes, shifts, size)


def click_prompts(clicks: Clicks) -> Prompts:
    """Makes one click on each object a prompt: the click, then padding."""
    padding = Clicks(torch.zeros_like(clicks.coords), torch.full_like(clicks.labels, PADDING))
    coords = torch.stack([clicks.coords, padding.coords], dim=1)
    return Prompts(coords, torch.stack([clicks.labels, padding.labels], dim=1))


def box_prompts(boxes: Tensor) -> Prompts:
    """Makes (P, 4) xyxy boxes prompts: their two corners, no padding."""
    corners = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], device=boxes.device)
    return Prompts(boxes.view(-1, 2, 2), corners.expand(len(boxes), 2))


def add_clicks(prompts: Prompts, clicks: Clicks) -> Prompts:
    """Says a click more about each object; padding stays at the end."""
    coords, labels = prompts.point_coords, prompts.point_labels
    coords = torch.cat([coords, clicks.coords[:, None]], dim=1)
    labels = torch.cat([labels, clicks.labels[:, None]], dim=1)
    # A stable sort that only tells padding from the rest moves the click in front of it.
    order = (labels == PADDING).long().argsort(dim=1, stable=True)
    return prompts._replace(
        point_coords=coords.gather(1, order[..., None].expand_as(coords)),
        point_labels=labels.gather(1, order),
    )
