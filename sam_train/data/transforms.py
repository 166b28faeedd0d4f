"""The one place where a record becomes a training sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam_train.data.annotations import measures, rles
from sam_train.data.augment import ColourJitter, Flips
from sam_train.data.crops import Crop, whole_image
from sam_train.ops.boxes import xywh_to_xyxy
from sam_train.ops.coords import View
from sam_train.ops.many_runs import ManyRuns
from sam_train.structures import ImageRecord, ImageSample

CROP_ATTEMPTS = 5
"""A random crop without any mask to draw is tried anew this often before the whole image is taken."""


SOMETHING = 1e-12
"""Of a pixel: less than that covers nothing."""


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
        areas, boxes = measures(record.annotations)
        candidates = np.flatnonzero(
            (areas > 0) & (areas <= self.max_area_fraction * height * width)
        )
        if not candidates.size:
            return None
        boxes = xywh_to_xyxy(boxes[candidates])
        view, drawable = self._choose_view(record.size, boxes, rng)
        if self.flips is not None:
            view = self.flips(view, rng)
        drawn = np.sort(rng.permutation(drawable)[: self.max_masks])
        if not drawn.size:
            return None
        try:
            runs = ManyRuns(rles(record.annotations, candidates[drawn].tolist()))
        except ValueError as error:  # run lengths are looked at no earlier than here
            raise record.damaged(error) from None
        visible_boxes, is_kept = self._visible(runs, boxes[drawn], _clip(boxes[drawn], view.window))
        if not is_kept.any():
            return None
        masks = self._on_grid(runs, view, visible_boxes, is_kept)
        if (empty := ~masks.reshape(len(masks), -1).any(axis=1)).any():
            id_ = record.annotations[candidates[drawn[is_kept][empty][0]]].id
            raise record.damaged(f"annotation {id_} has no pixel in its own bbox")
        return ImageSample(
            key=record.key,
            image=self._image(record, view, rng),
            masks=torch.from_numpy(masks),
            boxes=torch.from_numpy(view.boxes_to_input(visible_boxes[is_kept])).float(),
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
        # Columns by name, as numpy takes long to reduce a short axis.
        whole_w, whole_h = _sides(boxes)
        width, height = _sides(visible)
        share = (width * height) / np.maximum(whole_w * whole_h, 1e-9)
        longer = np.maximum(*_sides(view.boxes_to_input(visible))) * self.mask_size / self.img_size
        return np.flatnonzero(
            (np.minimum(width, height) > 0)
            & (share >= self.min_visible)
            & (longer >= self.min_mask_px)
        )

    def _visible(
        self, runs: ManyRuns, boxes: np.ndarray, clipped: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The (M, 4) xyxy boxes, original frame, of what is visible, and (M,) which masks show enough."""
        boxes, is_kept = boxes.copy(), np.ones(len(boxes), bool)
        is_cut = np.flatnonzero((clipped != boxes).any(axis=1))
        if not is_cut.size:
            return boxes, is_kept
        windows = np.hstack([np.floor(clipped[is_cut, :2]), np.ceil(clipped[is_cut, 2:])])
        areas, boxes[is_cut] = runs.inside(is_cut.tolist(), windows)
        is_kept[is_cut] = (areas > 0) & (areas >= self.min_visible * runs.areas[is_cut])
        return boxes, is_kept

    def _on_grid(
        self, runs: ManyRuns, view: View, boxes: np.ndarray, is_kept: np.ndarray
    ) -> np.ndarray:
        """The kept masks (M, h, w), bool: cells covered at least half as much as the best covered one.

        In most masks that one is full; the rest, too thin to fill a cell, would vanish otherwise.
        """
        which = np.flatnonzero(is_kept)
        x0, y0, x1, y1 = view.window
        x_lines, y_lines = view.grid_edges(self.img_size / self.mask_size, self.mask_size)
        x_lines, y_lines = x_lines.clip(x0, x1), y_lines.clip(y0, y1)
        left, top, right, bottom = boxes[which].T
        columns, rows = _cells(x_lines, left, right), _cells(y_lines, top, bottom)
        upright = np.zeros((len(which), self.mask_size, self.mask_size), bool)
        for some, covered in runs.coverage(which, _lines(x_lines, columns), _lines(y_lines, rows)):
            # The sliver keeps rounding from taking a cell that is exactly half covered now in, now out.
            least = covered.max(axis=(1, 2), initial=0) / 2 * (1 - 1e-9)
            is_in = covered >= np.maximum(least, SOMETHING)[:, None, None]
            places = np.hstack([rows[some], columns[some]]).tolist()
            for i, cells, (up, down, west, east) in zip(some.tolist(), is_in, places, strict=True):
                upright[i, up:down, west:east] = cells[: down - up, : east - west]
        oriented = view.orient(upright.transpose(1, 2, 0)).transpose(2, 0, 1)
        return np.ascontiguousarray(oriented)

    def _image(self, record: ImageRecord, view: View, rng: np.random.Generator) -> Tensor:
        window = np.ascontiguousarray(resize_window(record, view))
        if self.colour is not None:
            window = self.colour(window, rng)
        planes = np.empty((3, *window.shape[:2]), np.uint8)
        cv2.split(window, list(planes))  # twenty times as fast as a transposed copy
        return torch.from_numpy(planes)


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
    # Rows and columns outside of the window are not looked at, however the image comes.
    left, top, right, bottom = int(x0), int(y0), math.ceil(x1), math.ceil(y1)
    if isinstance(image, np.ndarray):
        near = Image.fromarray(image[top:bottom, left:right])
    elif (left, top, right, bottom) == (0, 0, *image.size):
        near = image
    else:
        near = image.crop((left, top, right, bottom))
    if reduced > 1 or near.size != (width, height):
        # Bilinear with antialiasing, as segment_anything's ResizeLongestSide.
        box = (x0 - left, y0 - top, x1 - left, y1 - top)
        near = near.resize((width, height), Image.Resampling.BILINEAR, box)
    return view.orient(np.asarray(near))


def _clip(boxes: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    x0, y0, x1, y1 = window
    return boxes.clip((x0, y0, x0, y0), (x1, y1, x1, y1))


def _sides(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The widths and heights of (M, 4) xyxy boxes."""
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def _cells(lines: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(M, 2) for each [start, end) the cells between ascending grid lines that it touches: first, end."""
    firsts = np.searchsorted(lines, starts, side="right") - 1
    lasts = np.searchsorted(lines, ends, side="left")
    return np.column_stack([np.maximum(firsts, 0), np.minimum(lasts, len(lines) - 1)])


def _lines(lines: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """(M, most + 1) the grid lines round cells from a first to an end, the last one repeated."""
    firsts, ends = cells[:, :1], cells[:, 1:]
    most = int((ends - firsts).max(initial=0))
    return lines[np.minimum(firsts + np.arange(most + 1), ends)]
