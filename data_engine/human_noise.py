"""How unsure a simulated annotator's eye and hand are."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from sam_train.ops.boxes import masks_to_boxes
from sam_train.prompts.boxes import gaussian_box_shifts, shift_boxes


@dataclass(frozen=True, kw_only=True)
class Eye:
    """Judges a mask against the object.

    Attributes:
        iou_noise: standard deviation of an IoU as it sees it.
    """

    iou_noise: float = 0.03

    def judge(
        self, mask: np.ndarray | None, gt_mask: np.ndarray, generator: np.random.Generator
    ) -> float:
        """The IoU of a mask with the object, (H, W) bool both, as the eye sees it; 0 for no mask."""
        noise = self.iou_noise * float(generator.standard_normal())
        return 0.0 if mask is None else iou(mask, gt_mask) + noise


@dataclass(frozen=True, kw_only=True)
class Hand:
    """Clicks, draws boxes and paints, a little off.

    Attributes:
        click_noise_px: standard deviation of a click along x and y, screen pixels.
        box_noise: that of a box's sides, as a fraction of its size.
        boundary_noise: that of a painted boundary, as a fraction of twice area over perimeter (a disc's
            radius), so that people agree on small objects as well as on large ones: they enlarge them.
        narrow: parts of an error that are narrower than twice this, as a fraction of the object's radius, are
            not painted.
    """

    click_noise_px: float = 2.0
    box_noise: float = 0.05
    boundary_noise: float = 0.07
    narrow: float = 0.1

    def click(
        self, x: float, y: float, region: np.ndarray, scale: float, generator: np.random.Generator
    ) -> tuple[float, float]:
        """Where a click meant for (x, y) lands.

        Args:
            x, y: pixel indices.
            region: (H, W) bool, what it is meant to hit; a click that would miss it is made again with
                more care, and hits.
            scale: screen pixels to a pixel of the image.
            generator: draws two numbers.
        """
        shift = generator.standard_normal(2) * self.click_noise_px / scale
        column, row = round(x + shift[0]), round(y + shift[1])
        height, width = region.shape
        is_hit = 0 <= row < height and 0 <= column < width and bool(region[row, column])
        return (float(column), float(row)) if is_hit else (x, y)

    def box(
        self, gt_mask: np.ndarray, generator: np.random.Generator
    ) -> tuple[float, float, float, float]:
        """The box that is drawn round an object, (H, W) bool with a pixel: xyxy edges with an area."""
        boxes = masks_to_boxes(torch.from_numpy(gt_mask)[None])
        sides = (boxes[0, 2:] - boxes[0, :2]).max()
        normal = torch.from_numpy(generator.standard_normal((1, 4)))
        shifts = gaussian_box_shifts(
            boxes, normal, sigma=self.box_noise, max_shift_px=float(sides) / 4
        )
        size = (gt_mask.shape[0], gt_mask.shape[1])
        drawn = shift_boxes(boxes, shifts, size)[0].tolist()
        if drawn[0] >= drawn[2] or drawn[1] >= drawn[3]:
            drawn = boxes[0].tolist()
        return drawn[0], drawn[1], drawn[2], drawn[3]

    def outline(self, gt_mask: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The object as this hand would paint it: its boundary moved in and out by a smooth noise.

        Args:
            gt_mask: (H, W) bool with a pixel.
            generator: draws a field of the size of the object's box and a margin.

        Returns:
            (H, W) bool with a pixel.
        """
        radius = 2 * float(np.count_nonzero(gt_mask)) / max(perimeter_px(gt_mask), 1.0)
        noise_px = self.boundary_noise * radius
        top, left, crop = _window(gt_mask, margin=int(4 * noise_px) + 2)
        field = _smooth_field(crop.shape, blur_px=max(1.0, radius / 2), generator=generator)
        painted = _signed_distance(crop) + noise_px * field > 0
        if not painted.any():
            return gt_mask.copy()
        whole = np.zeros_like(gt_mask)
        whole[top : top + crop.shape[0], left : left + crop.shape[1]] = painted
        return whole


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two (H, W) bool masks; 1 for two empty ones."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def perimeter_px(mask: np.ndarray) -> float:
    """The length of a mask's boundaries, those of its holes included, in pixels.

    Through the centres of its outermost pixels: that of a disc is its circumference less half a pixel all
    round, that of a single pixel 0.
    """
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return float(sum(cv2.arcLength(contour, True) for contour in contours))


def _window(mask: np.ndarray, margin: int) -> tuple[int, int, np.ndarray]:
    """Top, left and the pixels of a mask's box with a margin, as far as the image goes."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    y0, x0 = max(0, top - margin), max(0, left - margin)
    return y0, x0, mask[y0 : top + height + margin, x0 : left + width + margin]


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Pixels from the boundary, which runs between pixels: positive inside; the image's edge is no boundary."""
    inside = np.ascontiguousarray(mask).view(np.uint8)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    height = cv2.distanceTransform(1 - inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.where(mask, np.minimum(depth, mask.size) - 0.5, 0.5 - height)


def _smooth_field(
    shape: tuple[int, ...], *, blur_px: float, generator: np.random.Generator
) -> np.ndarray:
    """Noise of mean 0 and standard deviation 1, alike within some `blur_px`."""
    step = max(1.0, blur_px / 3)  # made on a coarser grid: it is smooth, and a wide kernel is slow
    sigma = blur_px / step
    rows, columns = (int(side / step) + 2 + int(6 * sigma) for side in shape)
    smooth = cv2.GaussianBlur(generator.standard_normal((rows, columns)), (0, 0), sigma)
    inner = smooth[int(3 * sigma) :, int(3 * sigma) :]
    inner = inner[: int(shape[0] / step) + 2, : int(shape[1] / step) + 2]
    fine = cv2.resize(inner, (0, 0), fx=step, fy=step, interpolation=cv2.INTER_LINEAR)
    # What a Gaussian kernel leaves of white noise's standard deviation of 1, in two dimensions.
    return fine[: shape[0], : shape[1]] * (2 * np.sqrt(np.pi) * sigma)
