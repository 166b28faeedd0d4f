"""An annotator at one image: what a page drives, and a simulated annotator likewise.

The image is encoded once. Objects are worked on one at a time: prompts, candidates, strokes, undo, then
`accept` or `clear`. Ready-made masks are kept, struck out, or taken up to be mended. All that is done is
recorded with its time, and handed in as a `Submission`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_engine.object_state import (
    Candidate,
    ObjectState,
    Point,
    answered,
    mask_logits,
    painted,
    stroke_pixels,
)
from data_engine.records import DrawnMask, Event, EventKind, Submission, Task
from sam_train.inference.predictor import SamPredictor
from sam_train.models.sam import Sam
from sam_train.ops import rle
from sam_train.structures import BACKGROUND, FOREGROUND


class SessionError(ValueError):
    """What was asked for cannot be done now: nothing to accept, no such candidate, a click outside."""


@dataclass(frozen=True)
class _Recorded:
    """An event, and which object it was for: by its number in order of time, not of acceptance."""

    event: Event
    object: int | None


class AnnotationSession:
    """The work on one image, by one annotator.

    Args:
        predictor: with the image set already (pixels=None), or to be set; or a model, of which the session
            makes a predictor of its own. A predictor is the session's own until the next image is set.
        pixels: (H, W, 3) uint8 RGB, encoded here; None where the predictor has the image.
        clock: seconds; what is recorded counts from now on.
        shown: ready-made masks of the task's payload, {"id", "rle", "predicted_iou", ...} each.
        model_id: of the model, which goes with the masks.

    Attributes:
        size: (H, W) of the image.
        shown: by id, those that are neither kept, struck out nor taken up.
    """

    # Of the object under work; all begin anew with the next one.
    _states: list[ObjectState]
    _undone: list[ObjectState]
    _corrects: str | None
    _model_before: str | None
    _num_clicks: int
    _since: float

    def __init__(
        self,
        predictor: SamPredictor | Sam,
        pixels: np.ndarray | None,
        *,
        clock: Callable[[], float],
        shown: Sequence[Mapping[str, Any]] = (),
        model_id: str | None = None,
    ) -> None:
        self._predictor = SamPredictor(predictor) if isinstance(predictor, Sam) else predictor
        if pixels is not None:
            self._predictor.set_image(pixels)
        if self._predictor.original_size is None:
            raise SessionError("no image is set: give the session its pixels")
        self.size = self._predictor.original_size
        # As an embedding comes out of a file: laid out otherwise, it gives other last digits.
        self._predictor.features = self._predictor.get_image_embedding().contiguous()
        self.shown = {str(one["id"]): one for one in shown}
        self._clock, self._opened = clock, clock()
        self._model_id = model_id
        self._recorded: list[_Recorded] = []
        self._masks: dict[int, DrawnMask] = {}
        self._number = 0
        self._start_object(ObjectState())

    @property
    def state(self) -> ObjectState:
        """The object under work."""
        return self._states[-1]

    @property
    def mask(self) -> np.ndarray | None:
        """The (H, W) bool mask under work, None before there is one."""
        return self.state.mask

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """What the model offers for the object, best predicted IoU first: three after the first prompt, else one."""
        return self.state.candidates

    @property
    def seconds_on_object(self) -> float:
        """Since the object before was done; tasks have a `move_on_after_s` to hold it against."""
        return self._clock() - self._since

    @property
    def masks(self) -> dict[int, DrawnMask]:
        """What was accepted and kept, by number; `remove` takes the number."""
        return dict(self._masks)

    def click(self, x: float, y: float, label: int = FOREGROUND) -> tuple[Candidate, ...]:
        """Says of a pixel whether it belongs to the object; returns the new candidates.

        Args:
            x, y: pixel indices, original frame.
            label: 1 for the object, 0 for what is not.

        Raises:
            SessionError: it lies outside, or the label is neither.
        """
        self._check_inside([(x, y)])
        if label not in (FOREGROUND, BACKGROUND):
            raise SessionError(f"a click's label is 1 or 0, got {label}")
        self._go_on(answered(self._predictor, self.state.with_click(x, y, label)))
        self._num_clicks += 1
        self._record("click", {"x": x, "y": y, "label": label})
        return self.candidates

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[Candidate, ...]:
        """Draws a box round the object, in the place of the one before; returns the new candidates.

        Args:
            x0, y0, x1, y1: edges, original frame.

        Raises:
            SessionError: it has no area or lies outside.
        """
        height, width = self.size
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise SessionError(
                f"a box is x0 < x1 <= {width}, y0 < y1 <= {height}, got {(x0, y0, x1, y1)}"
            )
        self._go_on(answered(self._predictor, replace(self.state, box=(x0, y0, x1, y1))))
        self._record("box", {"box": [x0, y0, x1, y1]})
        return self.candidates

    def choose(self, number: int) -> None:
        """Takes another candidate, as the model gave it: strokes on the one before are gone.

        Raises:
            SessionError: there is none of this number.
        """
        if not 0 <= number < len(self.candidates):
            raise SessionError(f"expected a candidate below {len(self.candidates)}, got {number}")
        self._go_on(self.state.with_choice(number))
        self._record("look", {"candidate": number})

    def paint(self, points: Sequence[Point], radius_px: float, *, fill: bool = False) -> None:
        """Adds a stroke of a round brush to the mask.

        Args:
            points: (x, y) along it, pixel indices.
            radius_px: of the brush; 0 is one pixel.
            fill: closes it and fills what it goes round.

        Raises:
            SessionError: it has no point, or one outside, or the brush is larger than the image.
        """
        self._stroke("brush", points, radius_px, fill)

    def erase(self, points: Sequence[Point], radius_px: float, *, fill: bool = False) -> None:
        """Takes a stroke away from the mask; as `paint`."""
        self._stroke("eraser", points, radius_px, fill)

    def undo(self) -> bool:
        """Takes the last prompt, choice or stroke on this object back; False where there is none."""
        if len(self._states) == 1:
            return False
        self._undone.append(self._states.pop())
        self._record("undo")
        return True

    def redo(self) -> bool:
        """Takes the last undo back; False where there is none."""
        if not self._undone:
            return False
        self._states.append(self._undone.pop())
        self._record("redo")
        return True

    def clear(self) -> None:
        """Gives the object up. A ready-made mask that it was taken up from is struck out with it."""
        self._record("delete", {} if self._corrects is None else {"id": self._corrects})
        self._recorded = [
            replace(one, object=None) if one.object == self._number else one
            for one in self._recorded
        ]
        self._next_object()

    def accept(self, label: str | None = None) -> DrawnMask:
        """Takes the mask under work as it is, and goes on to the next object.

        Args:
            label: its class, if the project has any.

        Raises:
            SessionError: there is no mask, or it is empty.
        """
        state = self.state
        if state.mask is None or not state.mask.any():
            raise SessionError("there is no mask to accept: click the object, or paint it")
        candidate = state.candidate
        made = DrawnMask(
            rle=rle.encode(state.mask),
            model_id=self._model_id if state.candidates else self._model_before,
            label=label,
            point_coords=state.points or None,
            predicted_iou=None if candidate is None else candidate.predicted_iou,
            stability_score=None if candidate is None else candidate.stability_score,
            seconds=self.seconds_on_object,
            num_clicks=self._num_clicks,
            corrects=self._corrects,
        )
        self._record("accept")
        self._masks[self._number] = made
        self._next_object()
        return made

    def take_up(self, shown_id: str) -> None:
        """Begins to mend a ready-made mask; clicks and strokes go on from it.

        Raises:
            SessionError: there is none of this id, or another object is under work.
        """
        if len(self._states) > 1 or self._corrects is not None:
            raise SessionError("another object is under work: accept it or give it up first")
        ready = self._shown(shown_id)
        mask = rle.decode(ready["rle"])
        self._corrects, self._model_before = shown_id, ready.get("model_id")
        self._states = [ObjectState(mask=mask, logits=mask_logits(self._predictor, mask))]
        del self.shown[shown_id]

    def keep(self, shown_id: str, label: str | None = None) -> DrawnMask:
        """Passes a ready-made mask as it is.

        Raises:
            SessionError: there is none of this id, or another object is under work.
        """
        ready = self._shown(shown_id)
        self.take_up(shown_id)
        made = DrawnMask(
            rle=ready["rle"],
            model_id=ready.get("model_id"),
            label=label,
            predicted_iou=ready.get("predicted_iou"),
            stability_score=ready.get("stability_score"),
            seconds=self.seconds_on_object,
            corrects=shown_id,
        )
        self._record("accept")
        self._masks[self._number] = made
        self._next_object()
        return made

    def delete(self, shown_id: str) -> None:
        """Strikes a ready-made mask out.

        Raises:
            SessionError: there is none of this id, or another object is under work.
        """
        self.take_up(shown_id)
        self.clear()

    def remove(self, number: int) -> None:
        """Takes a mask that was accepted or kept out again.

        Raises:
            SessionError: there is none of this number, see `masks`.
        """
        if number not in self._masks:
            raise SessionError(f"no mask {number} was accepted; there is {sorted(self._masks)}")
        del self._masks[number]
        self._recorded.append(_Recorded(Event(kind="delete", offset_s=self._offset_s), None))

    def submission(self, submission_id: str, task: Task) -> Submission:
        """All that was made and done, to be handed in; the object under work is not in it."""
        places = {number: place for place, number in enumerate(self._masks)}
        events = tuple(
            replace(one.event, mask_index=None if one.object is None else places.get(one.object))
            for one in self._recorded
        )
        return Submission(
            submission_id=submission_id,
            task_id=task.id,
            version=task.version,
            masks=tuple(self._masks.values()),
            events=events,
            seconds=self._offset_s,
        )

    @property
    def _offset_s(self) -> float:
        return self._clock() - self._opened

    def _start_object(self, state: ObjectState) -> None:
        self._states, self._undone = [state], []
        self._corrects, self._model_before = None, None
        self._num_clicks = 0  # also those that were undone
        self._since = self._clock()

    def _next_object(self) -> None:
        self._number += 1
        self._start_object(ObjectState())

    def _go_on(self, state: ObjectState) -> None:
        self._states.append(state)
        self._undone.clear()

    def _record(self, kind: EventKind, data: Mapping[str, Any] | None = None) -> None:
        event = Event(kind=kind, offset_s=self._offset_s, data=data or {})
        self._recorded.append(_Recorded(event, self._number))

    def _stroke(
        self, kind: EventKind, points: Sequence[Point], radius_px: float, fill: bool
    ) -> None:
        if not len(points) or not 0 <= radius_px <= max(self.size):
            raise SessionError(
                f"a stroke has points, and a radius from 0 to the image's longest side, got {radius_px}"
            )
        self._check_inside(points)
        stroke = stroke_pixels(self.size, points, radius_px, fill=fill)
        self._go_on(painted(self._predictor, self.state, stroke, kind == "brush"))
        along = [[float(x), float(y)] for x, y in points]
        self._record(kind, {"points": along, "radius_px": radius_px, "fill": fill})

    def _shown(self, shown_id: str) -> Mapping[str, Any]:
        if shown_id not in self.shown:
            raise SessionError(f"no ready-made mask {shown_id} is left to look at")
        return self.shown[shown_id]

    def _check_inside(self, points: Sequence[Point]) -> None:
        height, width = self.size
        for x, y in points:
            # A pixel's index names its corner: its right edge is still within.
            if not (0 <= x < width and 0 <= y < height):
                raise SessionError(
                    f"the point {(x, y)} lies outside of the image of {width} x {height} pixels"
                )
