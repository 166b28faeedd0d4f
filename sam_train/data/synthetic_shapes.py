"""Outlines for synthetic scenes, drawn in a unit frame and rasterised with soft edges.

Frames: a shape fills about [-1, 1] x [-1, 1], x to the right, y down, so that feet stand at y = 1.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

Outline = list[list[np.ndarray]]
"""Pieces that are united; a piece is (K, 2) contours filled by the even-odd rule, so holes are inner
contours."""

SUBPIXEL_BITS = 4


def rasterise(outline: Outline, size: tuple[int, int]) -> np.ndarray:
    """Coverage (H, W) uint8 in [0, 255] of an outline given in pixels."""
    coverage = np.zeros(size, np.uint8)
    for piece in outline:
        contours = [np.round(c * 2**SUBPIXEL_BITS).astype(np.int32) for c in piece]
        cv2.fillPoly(coverage, contours, 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return coverage


def transform(outline: Outline, matrix: np.ndarray) -> Outline:
    """Applies a (2, 3) affine matrix to every contour."""
    return [[c @ matrix[:, :2].T + matrix[:, 2] for c in piece] for piece in outline]


def affine(
    center: tuple[float, float] | np.ndarray,
    scale: tuple[float, float] | np.ndarray,
    angle: float = 0.0,
) -> np.ndarray:
    """(2, 3) matrix that scales by (x, y), turns by `angle` radians and moves the origin to `center`."""
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.column_stack([turn * np.asarray(scale, float), np.asarray(center, float)])


def _polar(radius: np.ndarray, angles: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], -1)


def ellipse(center: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Outline:
    """A plain ellipse."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return transform([[_polar(np.ones(48), turn)]], affine(center, radii, angle))


def blob(rng: Generator, roughness: float = 0.35) -> Outline:
    """A smooth closed curve: an irregular circle of a few harmonics."""
    turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    order = np.arange(2, 7)[:, None]
    strength = rng.normal(0, roughness, (5, 1)) / order
    waves = strength * np.cos(order * turn + rng.uniform(0, 2 * np.pi, (5, 1)))
    radius = np.clip(1 + waves.sum(0), 0.25, 1.6)
    return [[_polar(radius / radius.max(), turn)]]


def ragged(rng: Generator) -> Outline:
    """A leafy or crumbly edge: a blob with fine teeth."""
    contour = blob(rng)[0][0]
    fine = np.repeat(contour, 3, axis=0)
    fine += np.roll(fine, -1, axis=0)
    teeth = 1 + rng.normal(0, rng.uniform(0.03, 0.1), (len(fine), 1))
    return [[fine / 2 * teeth]]


def polygon(rng: Generator) -> Outline:
    """Three to eight straight sides."""
    sides = int(rng.integers(3, 9))
    turn = (np.arange(sides) + rng.uniform(-0.3, 0.3, sides)) * 2 * np.pi / sides
    return [[_polar(rng.uniform(0.65, 1, sides), turn + rng.uniform(0, 6))]]


def star(rng: Generator) -> Outline:
    """Four to nine points, or petals where the curve is smooth."""
    points = int(rng.integers(4, 10))
    depth = rng.uniform(0.15, 0.35)
    if rng.random() < 0.5:
        turn = np.linspace(0, 2 * np.pi, 120, endpoint=False)
        return [[_polar(1 - depth + depth * np.cos(points * turn), turn)]]
    turn = np.arange(2 * points) * np.pi / points
    return [[_polar(np.where(np.arange(2 * points) % 2, 1 - 2 * depth, 1.0), turn)]]


def superellipse(rng: Generator) -> Outline:
    """From a lens through a disc to a box with rounded corners, wide or narrow."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    power = rng.choice([rng.uniform(0.2, 0.5), rng.uniform(0.8, 1.2)])
    x, y = np.cos(turn), np.sin(turn)
    contour = np.stack([np.sign(x) * np.abs(x) ** power, np.sign(y) * np.abs(y) ** power], -1)
    return [[contour * [1, rng.uniform(0.4, 1)]]]


def spindle(rng: Generator) -> Outline:
    """A leaf: pointed at both ends and bent."""
    t = np.linspace(-1, 1, 32)
    half = rng.uniform(0.18, 0.5) * (1 - t**2)
    bend = rng.uniform(-0.4, 0.4) * (1 - t**2)
    upper, lower = np.stack([t, bend - half], -1), np.stack([t, bend + half], -1)
    return [[np.concatenate([upper, lower[::-1]])]]


def crescent(rng: Generator) -> Outline:
    """A moon or banana."""
    t = np.linspace(0.15, 0.85, 32) * np.pi * rng.uniform(0.9, 1.25)
    depth = rng.uniform(0.3, 0.55) * np.sin(np.linspace(0, np.pi, 32))
    return [[np.concatenate([_polar(np.ones(32), t), _polar(1 - depth, t)[::-1]])]]


def ring(rng: Generator) -> Outline:
    """A band round a hole: a tyre, or the frame of a window."""
    outer = (blob(rng, 0.1) if rng.random() < 0.6 else superellipse(rng))[0][0]
    return [[outer, outer * rng.uniform(0.4, 0.8) + rng.uniform(-0.06, 0.06, 2)]]


def lathe(rng: Generator) -> Outline:
    """A symmetric upright profile: bottles, vases, lamps."""
    heights = np.linspace(-1, 1, 48)
    knots = np.linspace(-1, 1, int(rng.integers(4, 8)))
    widths = rng.uniform(0.12, 0.6, len(knots))
    half = np.convolve(
        np.pad(np.interp(heights, knots, widths), 3, "edge"), np.ones(7) / 7, "valid"
    )
    left, right = np.stack([-half, heights], -1), np.stack([half, heights], -1)
    return [[np.concatenate([left, right[::-1]])]]


def _disc(center: np.ndarray, radius: float) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    return center + _polar(np.full(14, radius), turn)


def tube(points: np.ndarray, radii: ArrayLike) -> Outline:
    """A limb: discs of the given radii along a (K, 2) path, joined."""
    widths = np.broadcast_to(np.asarray(radii, float), len(points))
    discs = [_disc(p, float(r)) for p, r in zip(points, widths, strict=True)]
    hulls = [
        cv2.convexHull(np.concatenate(pair).astype(np.float32))[:, 0]
        for pair in zip(discs[:-1], discs[1:], strict=True)
    ]
    return [[hull.astype(np.float64)] for hull in hulls]


def curve(rng: Generator, length: int = 12, wildness: float = 0.35) -> np.ndarray:
    """A smooth random path (length, 2) that fills the unit frame."""
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(np.cumsum(rng.normal(0, wildness / 3, length)))
    path = np.cumsum(_polar(np.ones(length), heading), axis=0)
    path -= (path.max(0) + path.min(0)) / 2
    return path / max(np.abs(path).max(), 1e-6)


def worm(rng: Generator) -> Outline:
    """A thick curved line: a snake, a cable, a vessel."""
    taper = np.linspace(1, rng.uniform(0.3, 1), 12)
    return tube(0.9 * curve(rng), rng.uniform(0.06, 0.2) * taper)


def branches(rng: Generator) -> Outline:
    """A trunk that forks upwards, thinner with every fork."""
    outline: Outline = []

    def grow(start: np.ndarray, heading: float, length: float, radius: float, forks: int) -> None:
        bend = heading + rng.normal(0, 0.15)
        middle = start + length / 2 * np.array([np.cos(heading), np.sin(heading)])
        end = middle + length / 2 * np.array([np.cos(bend), np.sin(bend)])
        outline.extend(tube(np.stack([start, middle, end]), np.linspace(radius, 0.7 * radius, 3)))
        if forks:
            for side in (-1, 1):
                grow(
                    end,
                    bend + side * rng.uniform(0.2, 0.8),
                    0.75 * length,
                    0.65 * radius,
                    forks - 1,
                )

    grow(np.array([0.0, 1.0]), -np.pi / 2, 0.75, rng.uniform(0.06, 0.14), int(rng.integers(2, 4)))
    return outline


def glyph(rng: Generator) -> Outline:
    """A letter-like figure: a few strokes between the points of a coarse grid."""
    width = rng.uniform(0.08, 0.2)
    outline: Outline = []
    last = rng.integers(-1, 2, 2)
    for _ in range(int(rng.integers(2, 5))):
        target = rng.integers(-1, 2, 2)
        if (target == last).all():
            target = -target if target.any() else np.array([1, 1])
        middle = (last + target) / 2 + rng.choice([0.0, 0.35]) * rng.normal(0, 1, 2)
        t = np.linspace(0, 1, 7)[:, None]
        path = (1 - t) ** 2 * last + 2 * t * (1 - t) * middle + t**2 * target
        outline.extend(tube(np.clip(path, -1.1, 1.1) * [0.6, 0.85], width))
        last = target if rng.random() < 0.7 else rng.integers(-1, 2, 2)
    return outline


def box(x1: float, y1: float, x2: float, y2: float, slant: float = 0.0) -> Outline:
    """A rectangle whose upper side is shifted by `slant`."""
    return [[np.array([[x1 + slant, y1], [x2 + slant, y1], [x2, y2], [x1, y2]], float)]]


COMPACT = (blob, polygon, star, superellipse, spindle, ragged, crescent)
THIN = (worm, branches, glyph, ring)
