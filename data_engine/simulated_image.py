"""A simulated annotator at one image: all it does to it goes through an `AnnotationSession`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

from data_engine.annotator_settings import AnnotatorSettings
from data_engine.prominence import contrast_levels, prominence
from data_engine.records import Rle
from data_engine.sessions import AnnotationSession
from data_engine.time_model import SimulatedClock
from sam_train.ops import rle
from sam_train.prompts.points import center_click
from sam_train.structures import FOREGROUND


@dataclass
class Seen:
    """What became of the objects of an image.

    Attributes:
        left_out: overlooked, or there was no time left for them.
        given_up: tried in vain.
    """

    left_out: int = 0
    given_up: int = 0


class ImageWork:
    """The work on one image.

    Args:
        session: at the image, its clock `clock`.
        clock: told how long everything takes.
        pixels: (H, W, 3) uint8 RGB.
        objects: the ground truth; objects without a pixel are none.
        settings: of the annotator.
        generator: of all that is random.
        move_on_after_s: on one mask; None: never.
    """

    def __init__(
        self,
        session: AnnotationSession,
        clock: SimulatedClock,
        pixels: np.ndarray,
        objects: Sequence[Rle],
        settings: AnnotatorSettings,
        generator: np.random.Generator,
        move_on_after_s: float | None,
    ) -> None:
        self.seen = Seen()
        self._session, self._clock, self._pixels = session, clock, pixels
        self._objects = [one for one in objects if rle.area(one)]
        self._is_done = [False] * len(self._objects)
        self._settings, self._generator = settings, generator
        self._time = settings.time
        self._move_on_after_s = np.inf if move_on_after_s is None else move_on_after_s
        self._scale = settings.screen_px / max(session.size)
        self._clicked: list[tuple[float, float]] = []
        clock.spend(self._time.open_image_s)

    def look_over(self, *, to_the_end: bool = False) -> None:
        """Passes, mends or strikes out each ready-made mask.

        Args:
            to_the_end: also those for which there is no time left: an audit takes for struck out what does
                not come back.
        """
        shown = dict(self._session.shown)
        nearest = self._nearest([one["rle"] for one in shown.values()])
        for shown_id, place in zip(shown, nearest, strict=True):
            if self._is_over() and not to_the_end:
                return  # what was not looked at is not handed in
            self._clock.spend(self._time.look_s)
            is_double = place is None or self._is_done[place]
            gt_mask = None if place is None or is_double else rle.decode(self._objects[place])
            self._judge_shown(shown_id, rle.decode(shown[shown_id]["rle"]), gt_mask, place)

    def label_missing(self) -> None:
        """Labels what has no mask yet, the most prominent first."""
        missing = [place for place, done in enumerate(self._is_done) if not done]
        ranked, overlooked = self._ranked(missing)
        self.seen.left_out += len(overlooked)
        for number, place in enumerate(ranked):
            if self._is_over():
                self.seen.left_out += len(ranked) - number
                return
            self._clock.spend(self._time.find_s)
            self._is_done[place] = True
            gt_mask = rle.decode(self._objects[place])
            self._clicked = []
            self._begin(gt_mask)
            self._refine(gt_mask)

    def _ranked(self, places: Sequence[int]) -> tuple[list[int], list[int]]:
        """Objects in the order of work, and those that are overlooked."""
        attention, ranks, overlooked = self._settings.attention, [], []
        for place in places:
            mask = rle.decode(self._objects[place])
            side_px = float(np.sqrt(np.count_nonzero(mask))) * self._scale
            prob = attention.leave_out(side_px, contrast_levels(mask, self._pixels))
            if self._generator.random() < prob:
                overlooked.append(place)
            else:
                ranks.append((-prominence(mask, self._pixels), place))
        return [place for _, place in sorted(ranks)], overlooked

    def _nearest(self, shown: Sequence[Rle]) -> list[int | None]:
        """For each ready-made mask the object that it overlaps most, if any."""
        if not shown or not self._objects:
            return [None] * len(shown)
        plain = [[rle.compress(one) for one in group] for group in (shown, self._objects)]
        ious = coco_mask.iou(*plain, [0] * len(self._objects))
        return [int(row.argmax()) if row.max() > 0 else None for row in ious]

    def _judge_shown(
        self, shown_id: str, mask: np.ndarray, gt_mask: np.ndarray | None, place: int | None
    ) -> None:
        standards = self._settings.standards
        judged = 0.0 if gt_mask is None else self._judge(mask, gt_mask)
        self._clock.spend(self._time.key_s)
        if gt_mask is None or place is None or judged < standards.wrong_below:
            self._session.delete(shown_id)
            return
        self._is_done[place] = True
        if judged >= standards.good_enough:
            self._session.keep(shown_id)
            return
        self._clicked = []
        self._session.take_up(shown_id)
        self._click(gt_mask)
        self._refine(gt_mask, before=judged)

    def _begin(self, gt_mask: np.ndarray) -> None:
        if self._generator.random() < self._settings.box_prob:
            self._clock.spend(self._time.box_s)
            self._session.box(*self._settings.hand.box(gt_mask, self._generator))
        else:
            self._click(gt_mask)

    def _refine(self, gt_mask: np.ndarray, before: float = 0.0) -> None:
        """Clicks until the mask is good enough, then accepts it; paints where clicks are of no use."""
        patience, standards = self._settings.patience, self._settings.standards
        best, num_useless = before, 0
        last, seen = before, self._look(gt_mask)
        while True:
            if seen < best - standards.worse:
                self._clock.spend(self._time.key_s)
                self._session.undo()
                seen = last  # which is not the best one where two clicks in a row made it worse
            if seen >= standards.good_enough or self._is_late():
                break
            num_useless = 0 if seen > best + standards.noticeable else num_useless + 1
            best = max(best, seen)
            if len(self._clicked) >= patience.max_clicks or num_useless >= patience.useless_clicks:
                if self._paint(gt_mask):
                    seen = self._look(gt_mask)
                break
            self._click(gt_mask)
            last, seen = seen, self._look(gt_mask)
        self._stop(seen)

    def _stop(self, seen: float) -> None:
        self._clock.spend(self._time.key_s)
        mask = self._session.mask
        if seen >= self._settings.standards.acceptable and mask is not None and mask.any():
            self._session.accept()
        else:
            self.seen.given_up += 1
            self._session.clear()

    def _look(self, gt_mask: np.ndarray) -> float:
        """Looks at each candidate, or at what was painted, and takes what looks best."""
        session = self._session
        if session.state.chosen is None:
            self._clock.spend(self._time.look_s)
            return self._judge(session.mask, gt_mask)
        self._clock.spend(self._time.look_s * len(session.candidates))
        judged = [self._judge(one.mask, gt_mask) for one in session.candidates]
        best = int(np.argmax(judged))
        if best != session.state.chosen:
            self._clock.spend(self._time.key_s)
            session.choose(best)
        return judged[best]

    def _judge(self, mask: np.ndarray | None, gt_mask: np.ndarray) -> float:
        return self._settings.eye.judge(mask, gt_mask, self._generator)

    def _click(self, gt_mask: np.ndarray) -> None:
        """Clicks where the error is, by the project's one definition of that."""
        mask = self._session.mask
        exclude = torch.tensor(self._clicked, dtype=torch.float).reshape(1, -1, 2)
        pred_masks = None if mask is None else torch.from_numpy(mask)[None]
        aimed = center_click(torch.from_numpy(gt_mask)[None], pred_masks, exclude)
        label = int(aimed.labels[0])
        wrong = gt_mask if mask is None else gt_mask ^ mask
        region = wrong & (gt_mask if label == FOREGROUND else ~gt_mask)
        x, y = aimed.coords[0].tolist()
        x, y = self._settings.hand.click(x, y, region, self._scale, self._generator)
        self._clock.spend(self._time.click_s)
        self._clicked.append((x, y))
        self._session.click(x, y, label)

    def _paint(self, gt_mask: np.ndarray) -> bool:
        """Paints what is missing and erases what is too much, the largest parts first, while there is time.

        Returns:
            Whether there was anything to paint, and time for it.
        """
        is_painted = False
        target = self._settings.hand.outline(gt_mask, self._generator)
        box = cv2.boundingRect(gt_mask.view(np.uint8))
        for is_brush in (True, False, True):
            mask = self._session.mask
            mask = np.zeros_like(target) if mask is None else mask
            wrong = target & ~mask if is_brush else mask & ~target
            for outline in _outlines(wrong, target, self._settings.hand.narrow):
                seconds = self._time.painting_s(
                    cv2.arcLength(outline, True),
                    object_px=max(box[2:]),
                    screen_scale=self._scale,
                )
                if self._is_late(seconds):
                    return is_painted
                self._clock.spend(seconds)
                points = [(float(x), float(y)) for x, y in outline[:, 0]]
                stroke = self._session.paint if is_brush else self._session.erase
                stroke(points, 0, fill=True)
                is_painted = True
        return is_painted

    def _is_late(self, more_s: float = 0.0) -> bool:
        """Whether the time for one mask is over, or would be after some more seconds."""
        return self._session.seconds_on_object + more_s >= self._move_on_after_s

    def _is_over(self) -> bool:
        return self._clock() >= self._settings.patience.max_image_s


def _outlines(wrong: np.ndarray, target: np.ndarray, narrow: float) -> list[np.ndarray]:
    """The outlines (N, 1, 2) of the parts of an error that are wide enough to bother, the largest first."""
    radius = np.sqrt(np.count_nonzero(target) / np.pi)
    side = 2 * max(1, round(narrow * radius)) + 1
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    wide = cv2.morphologyEx(wrong.view(np.uint8), cv2.MORPH_OPEN, brush)
    outlines, _ = cv2.findContours(wide, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return sorted(outlines, key=lambda one: (-cv2.contourArea(one), *one[0, 0].tolist()))
