"""The picture being painted: light, shadow, occlusion and the camera.

Painting keeps the masks right: whatever is painted over an earlier mask is taken out of it, and a
whole is added after its parts, so that it always includes them.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator

from sam_train.data.synthetic_objects import Thing
from sam_train.data.synthetic_shapes import rasterise, transform
from sam_train.data.synthetic_textures import Material, noise

RELIEF_SIDE_PX = 48
WHOLE_COVERED = 0.85


def _bounds(alpha: np.ndarray) -> tuple[slice, slice]:
    x, y, w, h = cv2.boundingRect(alpha)
    return slice(y, y + h), slice(x, x + w)


class Canvas:
    """An image in the making and the visible parts of what is on it.

    Attributes:
        image: (H, W, 3) float32 RGB in about [0, 1].
        masks: (H, W) bool each, visible pixels only.
        full_areas: pixels each mask had before anything came in front of it.
        unit_px: the length that is one pixel where the shorter side is 256.
        light: (x, y) direction in the image from which light falls.
    """

    def __init__(self, rng: Generator, size: tuple[int, int]) -> None:
        self.size = size
        self.image = np.zeros((*size, 3), np.float32)
        self.masks: list[np.ndarray] = []
        self.full_areas: list[int] = []
        self.unit_px = min(size) / 256
        turn = rng.uniform(-np.pi, 0)
        self.light = np.array([np.cos(turn), np.sin(turn)])

    def annotate(self, mask: np.ndarray) -> None:
        """Adds a mask of what can be seen at this moment."""
        self.masks.append(mask)
        self.full_areas.append(int(mask.sum()))

    def paint(
        self, rng: Generator, alpha: np.ndarray, material: Material, *, relief: float = 0.0
    ) -> None:
        """Covers the image by (H, W) uint8 `alpha` and takes it out of the masks below.

        Args:
            relief: how strongly the light models the silhouette as something round.
        """
        rows, columns = _bounds(alpha)
        cut = alpha[rows, columns]
        if not cut.size:
            return
        surface = material.render(rng, cut.shape)
        if relief:
            self._shade(surface, cut, relief, material.gloss)
        weight = cut.astype(np.float32)[..., None] * np.float32(1 / 255)
        region = self.image[rows, columns]
        region += weight * (surface - region)
        solid = cut > 127
        for mask in self.masks:
            mask[rows, columns] &= ~solid

    def _shade(self, surface: np.ndarray, alpha: np.ndarray, relief: float, gloss: float) -> None:
        """Lights a surface as if its silhouette were the outline of a rounded body."""
        h, w = alpha.shape
        shrink = min(1.0, RELIEF_SIDE_PX / max(h, w))
        small_size = max(round(w * shrink), 2), max(round(h * shrink), 2)
        small = cv2.resize(alpha, small_size, interpolation=cv2.INTER_AREA)
        solid = cv2.copyMakeBorder((small > 127).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        depth_px = cv2.distanceTransform(solid, cv2.DIST_L2, 3)[1:-1, 1:-1]
        depth = depth_px / max(float(depth_px.max()), 1e-3)
        height = cv2.blur(np.sqrt(depth * (2 - depth)), (5, 5)) * 6
        slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=0.125)
        slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=0.125)
        facing = -(slope_x * self.light[0] + slope_y * self.light[1])
        facing = facing / np.sqrt(1 + slope_x**2 + slope_y**2)
        light = cv2.resize((1 + relief * facing).astype(np.float32), (w, h))
        surface *= light[..., None]
        if gloss > 0.3:
            shine = np.clip((facing - 0.35) * 3, 0, 1).astype(np.float32) ** 2 * np.float32(gloss)
            surface += cv2.resize(shine, (w, h))[..., None] * np.float32(0.6)

    def cast_shadow(self, alpha: np.ndarray, strength: float, length_px: float) -> None:
        """Darkens what lies beside and below a silhouette, away from the light."""
        h, w = self.size
        small = cv2.resize(alpha, (w // 4, h // 4), interpolation=cv2.INTER_AREA)
        shift = -self.light * length_px / 4
        move = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
        blur = max(3, int(length_px / 4) | 1)
        moved = cv2.blur(cv2.warpAffine(small, move, small.shape[::-1]), (blur, blur))
        shadow = cv2.resize(moved, (w, h)).astype(np.float32) * np.float32(strength / 255)
        self.image *= 1 - shadow[..., None]

    def place(
        self,
        rng: Generator,
        thing: Thing,
        matrix: np.ndarray,
        *,
        parts: bool = False,
        shadow: float = 0.0,
        relief: float = 0.0,
    ) -> None:
        """Paints a thing and adds its whole as a mask, after its parts where those are wanted.

        Args:
            matrix: (2, 3) affine from the unit frame to pixels.
            parts: whether annotated parts become masks as well.
            shadow: darkness of the shadow it casts, 0 for none.
        """
        outlines = [transform(part.outline, matrix) for part in thing]
        extent = float(np.abs(matrix[:, :2]).sum(1).max())
        if shadow:
            behind = rasterise([piece for outline in outlines[:1] for piece in outline], self.size)
            for part, outline in zip(thing[1:], outlines[1:], strict=True):
                if not part.inside:
                    behind |= rasterise(outline, self.size)
            self.cast_shadow(behind, shadow, extent * 0.25)
        whole = np.zeros(self.size, np.uint8)
        parts_before = len(self.masks)
        for part, outline in zip(thing, outlines, strict=True):
            alpha = rasterise(outline, self.size)
            if part.inside:
                alpha = np.minimum(alpha, whole)
            self.paint(rng, alpha, part.material, relief=relief)
            whole = np.maximum(whole, alpha)
            if parts and part.annotated:
                self.annotate(alpha > 127)
        solid = whole > 127
        whole_area = np.count_nonzero(solid)
        kept = [
            (mask, full)
            for mask, full in zip(
                self.masks[parts_before:], self.full_areas[parts_before:], strict=True
            )
            # A part that is nearly the whole is the whole; one that later parts hid is no part.
            if np.count_nonzero(mask) < WHOLE_COVERED * whole_area
        ]
        del self.masks[parts_before:], self.full_areas[parts_before:]
        self.masks += [mask & solid for mask, _ in kept]
        self.full_areas += [full for _, full in kept]
        self.annotate(solid)

    def expose(self, rng: Generator) -> None:
        """Brings the mean brightness to what a camera's meter would choose, within its reach."""
        wanted = rng.uniform(0.28, 0.52)
        self.image *= np.float32(np.clip(wanted / max(float(self.image.mean()), 1e-3), 0.6, 2.5))

    def visible_masks(self, min_area_px: float, min_share: float) -> list[np.ndarray]:
        """The masks of which enough is still to be seen, each once."""
        limit = 0.9 * self.size[0] * self.size[1]
        kept = {}
        for mask, full in zip(self.masks, self.full_areas, strict=True):
            area = int(np.count_nonzero(mask))
            if min_area_px <= area <= limit and area >= min_share * full:
                # Of a thing of which only one part is left in sight, part and whole are the same.
                kept[mask.tobytes()] = mask
        return list(kept.values())


def photograph(rng: Generator, image: np.ndarray, *, grey: bool = False) -> np.ndarray:
    """Takes the picture: uneven light, exposure, tint, blur, sensor noise, JPEG.

    Args:
        image: (H, W, 3) float32 RGB in about [0, 1]; changed in place.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    size = image.shape[:2]
    unit_px = min(size) / 256
    light = 1 + rng.uniform(0, 0.5) * (noise(rng, size, 120 * unit_px) - 0.5)
    if rng.random() < 0.4:
        light -= rng.uniform(0.1, 0.5) * _distance_from_centre(rng, size)
    image *= light[..., None]
    image *= rng.normal(1, 0.06, 3).astype(np.float32) * np.float32(rng.uniform(0.75, 1.2))
    if grey:
        image[:] = image.mean(-1, keepdims=True)
    blur = rng.random()
    if blur < 0.35:
        cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2) * unit_px, dst=image)
    elif blur < 0.42:
        length = int(rng.integers(2, 5))
        kernel = np.eye(length) if rng.random() < 0.5 else np.ones((1, length))
        cv2.filter2D(image, -1, kernel / kernel.sum(), dst=image)
    np.clip(image, 0, 1, out=image)
    if rng.random() < 0.5:
        # A tone curve: 0 and 1 stay, the middle moves.
        cv2.pow(image, rng.uniform(0.75, 1.35), dst=image)
    image *= 255
    sigma = rng.exponential(4.0)
    if sigma > 1:
        # The sum of two dice is bell-shaped enough, and much cheaper than normal numbers.
        dice = rng.integers(0, 256, (2, *size, 1 if grey else 3), np.uint8).astype(np.float32)
        image += (dice[0] + dice[1] - 255) * np.float32(min(sigma, 16) / 105)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.7:
        pixels = _jpeg(pixels, quality=int(rng.integers(35, 96)))
    return pixels


def _jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    _, coded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def _distance_from_centre(rng: Generator, size: tuple[int, int]) -> np.ndarray:
    """Squared distance from a point near the middle, about 1 in the corners; (H, W) float32."""
    y, x = np.ogrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    x0, y0 = rng.normal(0, 0.2, 2)
    return ((x - x0) ** 2 / 2 + (y - y0) ** 2 / 2).astype(np.float32)
