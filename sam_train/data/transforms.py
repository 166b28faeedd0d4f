"""The one place where a record becomes a training sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam_train.data.augment import ColourJitter, Flips
from sam_train.data.crops import Crop, whole_image
from sam_train.ops.boxes import xywh_to_xyxy
from sam_train.ops.coords import View
from sam_train.ops.rle import Runs
from sam_train.structures import Annotation, ImageRecord, ImageSample

CROP_ATTEMPTS = 5
"""A random crop without any mask to draw is tried anew this often before the whole image is taken."""


Lines = tuple[np.ndarray, np.ndarray]
"""x and y of the mask grid's lines, original frame, clipped to the window: see `View.grid_edges`."""


@dataclass(frozen=True, kw_only=True)
class ToSample:
    """Draws masks of an image, crops, resizes and augments; decodes no other mask, and no pixel twice.

    Attributes:
        img_size: the side of the model input; the longest side of the crop is resized to it.
        mask_size: the side of the mask grid, which covers the padded model input.
        max_masks: at most this many masks are drawn.
        max_area_fraction: masks over this share of the image are not drawn.
        min_mask_px: nor those whose longer side is below this, in cells of the mask grid.
        min_visible: nor those a crop leaves less of, as a share of their area.
        crop: chooses the part of the image; the whole of it by default.
        flips: mirrors and turns, or none.
        colour: changes of colour, or none.
    """

    img_size: int
    mask_size: int
    max_masks: int = 64
    max_area_fraction: float = 0.9
    min_mask_px: float = 1.0
    min_visible: float = 0.3
    crop: Crop | None = None
    flips: Flips | None = None
    colour: ColourJitter | None = None

    def __post_init__(self) -> None:
        if self.mask_size > self.img_size or self.max_masks < 1:
            raise ValueError(
                f"expected mask_size <= img_size and max_masks >= 1, got mask_size={self.mask_size}, "
                f"img_size={self.img_size}, max_masks={self.max_masks}"
            )

    def __call__(self, record: ImageRecord, seed: int) -> ImageSample | None:
        """Makes a sample out of a record, or None if no mask in it can be drawn.

        Args:
            record: one image with its masks.
            seed: from `sample_seed`; all that is random follows from it.

        Raises:
            DamagedSampleError: the record's pixels cannot be decoded.
        """
        rng = np.random.default_rng(seed)
        height, width = record.size
        candidates = [
            annotation
            for annotation in record.annotations
            if 0 < annotation.area <= self.max_area_fraction * height * width
        ]
        if not candidates:
            return None
        boxes = xywh_to_xyxy(np.array([annotation.bbox for annotation in candidates]))
        view, drawable = self._choose_view(record.size, boxes, rng)
        if self.flips is not None:
            view = self.flips(view, rng)
        drawn = np.sort(rng.permutation(drawable)[: self.max_masks])
        # What all masks share is made once.
        x0, y0, x1, y1 = view.window
        x_lines, y_lines = view.grid_edges(self.img_size / self.mask_size, self.mask_size)
        lines = x_lines.clip(x0, x1), y_lines.clip(y0, y1)
        visible = _clip(boxes, view.window)
        try:
            decoded = [
                self._decode(candidates[i], view, lines, boxes[i], visible[i])
                for i in drawn.tolist()
            ]
        except ValueError as error:  # run lengths are looked at no earlier than here
            raise record.damaged(error) from None
        masks = [mask for mask, _ in filter(None, decoded)]
        if not masks:
            return None
        visible_boxes = np.stack([box for _, box in filter(None, decoded)])
        return ImageSample(
            key=record.key,
            image=self._image(record, view, rng),
            masks=torch.from_numpy(np.stack(masks)),
            boxes=torch.from_numpy(view.boxes_to_input(visible_boxes)).float(),
            input_size=view.input_size,
            original_size=record.size,
            seed=seed,
        )

    def _choose_view(
        self, size: tuple[int, int], boxes: np.ndarray, rng: np.random.Generator
    ) -> tuple[View, np.ndarray]:
        """A view, and the indices of the masks that by their boxes can be drawn in it."""
        if self.crop is not None:
            for _ in range(CROP_ATTEMPTS):
                view = self.crop(size, boxes, self.img_size, rng)
                drawable = self._drawable(view, boxes)
                if drawable.size:
                    return view, drawable
        view = whole_image(size, boxes, self.img_size, rng)
        return view, self._drawable(view, boxes)

    def _drawable(self, view: View, boxes: np.ndarray) -> np.ndarray:
        visible = _clip(boxes, view.window)
        sides = visible[:, 2:] - visible[:, :2]
        share = sides.prod(axis=1) / np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1e-9)
        in_input = view.boxes_to_input(visible)
        longer = (in_input[:, 2:] - in_input[:, :2]).max(axis=1) * self.mask_size / self.img_size
        return np.flatnonzero(
            (sides.min(axis=1) > 0) & (share >= self.min_visible) & (longer >= self.min_mask_px)
        )

    def _decode(
        self,
        annotation: Annotation,
        view: View,
        lines: Lines,
        box: np.ndarray,
        visible: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The (h, w) bool mask on the mask grid and the xyxy box, original frame, of what is visible."""
        runs = Runs(annotation.rle)
        if (visible != box).any():
            x0, y0 = np.floor(visible[:2])
            x1, y1 = np.ceil(visible[2:])
            cut = runs.coverage(np.arange(x0, x1 + 1), np.arange(y0, y1 + 1)) > 0
            if not cut.any() or cut.sum() < self.min_visible * runs.area:
                return None
            x, y = np.flatnonzero(cut.any(axis=0)), np.flatnonzero(cut.any(axis=1))
            box = np.array([x0 + x[0], y0 + y[0], x0 + x[-1] + 1, y0 + y[-1] + 1])
        mask = self._on_grid(runs, view, lines, box)
        if mask is None:
            raise ValueError(f"annotation {annotation.id} has no pixel in its own bbox")
        return mask, box

    def _on_grid(self, runs: Runs, view: View, lines: Lines, box: np.ndarray) -> np.ndarray | None:
        """Cells covered at least half as much as the best covered one.

        In most masks that one is full; the rest, too thin to fill a cell, would vanish otherwise.
        """
        x_lines, y_lines = lines
        left, top, right, bottom = box.tolist()
        columns, rows = _cells(x_lines, left, right), _cells(y_lines, top, bottom)
        covered = runs.coverage(
            x_lines[columns.start : columns.stop + 1], y_lines[rows.start : rows.stop + 1]
        )
        best = covered.max(initial=0.0)
        if best == 0:
            return None
        upright = np.zeros((self.mask_size, self.mask_size), bool)
        # The sliver keeps rounding from taking a cell that is exactly half covered now in, now out.
        upright[rows, columns] = covered >= best / 2 * (1 - 1e-9)
        return view.orient(upright)

    def _image(self, record: ImageRecord, view: View, rng: np.random.Generator) -> Tensor:
        window = resize_window(record, view)
        if self.colour is not None:
            window = self.colour(np.ascontiguousarray(window), rng)
        return torch.from_numpy(np.ascontiguousarray(window.transpose(2, 0, 1)))


def _shrink(view: View) -> int:
    """The coarsest of a JPEG's own scales that is no coarser than the view."""
    x0, y0, x1, y1 = view.window
    height, width = view.resized
    scale = min((x1 - x0) / width, (y1 - y0) / height)
    return max(n for n in (1, 2, 4, 8) if n == 1 or n <= scale)


def resize_window(record: ImageRecord, view: View) -> np.ndarray:
    """The (h, w, 3) uint8 pixels of a view of a record's image, as the model is shown them."""
    height, width = view.resized
    image, reduced = record.reduced_image(_shrink(view))
    x0, y0, x1, y1 = (side / reduced for side in view.window)
    if reduced == 1 and (y1 - y0, x1 - x0) == view.resized:
        return view.orient(image[int(y0) : int(y1), int(x0) : int(x1)])
    # Bilinear with antialiasing, as segment_anything's ResizeLongestSide. Rows and columns far
    # outside of the window are not copied.
    left, top = int(x0), int(y0)
    near = image[top : int(np.ceil(y1)), left : int(np.ceil(x1))]
    box = (x0 - left, y0 - top, x1 - left, y1 - top)
    resized = Image.fromarray(near).resize((width, height), Image.Resampling.BILINEAR, box)
    return view.orient(np.asarray(resized))


def _clip(boxes: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    low, high = np.tile(window[:2], 2), np.tile(window[2:], 2)
    return boxes.clip(low, high)


def _cells(lines: np.ndarray, start: float, end: float) -> slice:
    """The cells between ascending grid lines that [start, end) touches."""
    first = int(np.searchsorted(lines, start, side="right")) - 1
    last = int(np.searchsorted(lines, end, side="left"))
    return slice(max(first, 0), min(last, len(lines) - 1))
