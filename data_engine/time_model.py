"""How long a simulated annotator takes, by a stated model; `conf/annotator/` has the reason for each constant."""

from __future__ import annotations

from dataclasses import dataclass, fields


class SimulatedClock:
    """Stands still but for what `spend` adds; what a session takes as its clock.

    Attributes:
        now: seconds since it was made.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds


@dataclass(frozen=True, kw_only=True)
class TimeModel:
    """Seconds for each thing that an annotator does.

    Attributes:
        open_image_s: the first look at an image.
        find_s: deciding on the next object.
        click_s: a click.
        box_s: a box.
        look_s: judging one mask.
        key_s: a key: accept, undo, strike out.
        stroke_s: putting the brush or the eraser down.
        stroke_px_per_s: drawing along an outline, screen pixels.
        zoom_px: longer side on the screen of an object that is painted.
        max_zoom: how many times the screen-filling image is enlarged at most.
    """

    open_image_s: float = 3.0
    find_s: float = 1.5
    click_s: float = 1.75
    box_s: float = 3.5
    look_s: float = 0.7
    key_s: float = 0.5
    stroke_s: float = 1.0
    stroke_px_per_s: float = 30.0
    zoom_px: float = 400.0
    max_zoom: float = 8.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 0 or (value == 0 and not field.name.endswith("_s")):
                raise ValueError(f"{field.name} is a number above 0, got {value}")
        if self.stroke_px_per_s == 0:
            raise ValueError("stroke_px_per_s is a number above 0, got 0")

    def painting_s(self, length_px: float, *, object_px: float, screen_scale: float) -> float:
        """A stroke's seconds.

        Args:
            length_px: of its outline, pixels of the image.
            object_px: longer side of the object's box, likewise.
            screen_scale: screen pixels to a pixel of the image where that fills the screen.
        """
        zoom = min(self.max_zoom, max(1.0, self.zoom_px / (max(object_px, 1.0) * screen_scale)))
        return self.stroke_s + length_px * screen_scale * zoom / self.stroke_px_per_s
