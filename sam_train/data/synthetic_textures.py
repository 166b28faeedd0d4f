"""Surfaces for synthetic scenes: a pattern of values in [0, 1], coloured by a ramp.

Patterns are built from small random grids that OpenCV stretches and turns, so that a surface costs a
few array operations whatever its size. Lengths are pixels; colours are RGB in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.random import Generator

GRID = 64
COARSE_PX = 14
LEVELS = np.arange(256)


def noise(
    rng: Generator,
    size: tuple[int, int],
    wavelength_px: float,
    *,
    octaves: int = 1,
    stretch: float = 1.0,
    angle: float = 0.0,
) -> np.ndarray:
    """Value noise, (H, W) float32 about 0.5 in [0, 1].

    Args:
        size: (H, W) of the answer.
        wavelength_px: distance between neighbouring random values in the first octave.
        octaves: how many layers, each twice as fine and 0.6 times as strong as the one before.
        stretch: how many times longer than wide the grains are.
        angle: direction of the grains, in radians.
    """
    grid = rng.random((GRID, GRID), dtype=np.float32) - np.float32(0.5)
    total = np.zeros(size, np.float32)
    variance = 0.0
    for octave in range(octaves):
        step = wavelength_px / 2**octave
        turn = angle + (0.5 * octave if stretch == 1 else 0.0)
        # Coarse layers are worked out on every fourth pixel and stretched: they cost next to nothing.
        skip = 4 if step > COARSE_PX and min(size) > COARSE_PX else 1
        cos, sin = skip * np.cos(turn) / step, skip * np.sin(turn) / step
        shift = rng.uniform(0, GRID, 2)
        layer = cv2.warpAffine(
            grid,
            np.array([[cos / stretch, sin / stretch, shift[0]], [-sin, cos, shift[1]]], np.float32),
            (-(-size[1] // skip), -(-size[0] // skip)),
            # The cubic kernel hides the grid; at the finest scales nothing of it can be seen.
            flags=(cv2.INTER_CUBIC if step > 3 else cv2.INTER_LINEAR) | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_WRAP,
        )
        if skip > 1:
            layer = cv2.resize(layer, size[::-1])
        cv2.scaleAdd(layer, 0.6**octave, total, dst=total)
        variance += 0.36**octave
    return np.clip(total * np.float32(1.1 / np.sqrt(variance)) + 0.5, 0, 1)


def _axes(size: tuple[int, int], wavelength_px: float, angle: float) -> tuple[np.ndarray, ...]:
    """Turned pixel coordinates in wavelengths, each (H, W) float32."""
    y, x = np.ogrid[: size[0], : size[1]]
    cos, sin = np.float32(np.cos(angle) / wavelength_px), np.float32(np.sin(angle) / wavelength_px)
    x, y = x.astype(np.float32), y.astype(np.float32)
    return x * cos + y * sin, y * cos - x * sin


def _plain(rng: Generator, size: tuple[int, int], wavelength_px: float, angle: float) -> np.ndarray:
    return noise(rng, size, 6 * wavelength_px + 20)


def _gradient(rng: Generator, size: tuple[int, int], _: float, angle: float) -> np.ndarray:
    along, _across = _axes(size, max(size), angle)
    along = along - along.min()
    return along / max(float(along.max()), 1e-3)


def _fractal(rng: Generator, size: tuple[int, int], wavelength_px: float, _: float) -> np.ndarray:
    return noise(rng, size, 2 * wavelength_px, octaves=4)


def _fibres(
    rng: Generator, size: tuple[int, int], wavelength_px: float, angle: float
) -> np.ndarray:
    return noise(rng, size, 0.5 * wavelength_px, octaves=2, stretch=rng.uniform(3, 9), angle=angle)


def _warped(
    rng: Generator, size: tuple[int, int], wavelength_px: float, amount: float
) -> np.ndarray:
    return amount * noise(rng, size, 4 * wavelength_px)


def _stripes(
    rng: Generator, size: tuple[int, int], wavelength_px: float, angle: float
) -> np.ndarray:
    along, _ = _axes(size, wavelength_px, angle)
    wave = np.sin(2 * np.pi * (along + _warped(rng, size, wavelength_px, rng.uniform(0, 3))))
    return np.clip(0.5 + rng.choice([0.5, 3.0]) * (wave + rng.uniform(-0.6, 0.6)), 0, 1)


def _rings(rng: Generator, size: tuple[int, int], wavelength_px: float, angle: float) -> np.ndarray:
    along, across = _axes(size, 0.5 * wavelength_px, angle)
    grain = 0.2 * along + across + 8 * noise(rng, size, 5 * wavelength_px, stretch=3, angle=angle)
    return 0.5 + 0.5 * np.sin(grain)


def _tiles(rng: Generator, size: tuple[int, int], wavelength_px: float, angle: float) -> np.ndarray:
    """Checks, tiles and bricks: a value a tile, and a joint between them."""
    along, across = _axes(size, wavelength_px, angle)
    row = np.floor(across)
    along = along / rng.choice([1.0, 1.0, 2.0]) + rng.choice([0.0, 0.5]) * row
    column = np.floor(along)
    if rng.random() < 0.4:
        values = np.mod(row + column, 2)
    else:
        grid = rng.random((17, 19), dtype=np.float32) * 0.6 + 0.3
        values = grid[row.astype(np.int32) % 17, column.astype(np.int32) % 19]
    from_middle = np.maximum(np.abs(along - column - 0.5), np.abs(across - row - 0.5))
    joint = from_middle > 0.5 - 1 / (wavelength_px + 2)
    return np.where(joint, np.float32(rng.choice([0.0, 1.0])), values).astype(np.float32)


def voronoi(
    rng: Generator, size: tuple[int, int], wavelength_px: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cell numbers (H, W) int32 and distance to the cell's seed in wavelengths (H, W) float32."""
    seeds = np.ones(size, np.uint8)
    count = int(np.clip(size[0] * size[1] / wavelength_px**2, 2, 4000))
    seeds[rng.integers(0, size[0], count), rng.integers(0, size[1], count)] = 0
    distance, labels = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    return labels, distance * np.float32(1 / wavelength_px)


def _cobbles(rng: Generator, size: tuple[int, int], wavelength_px: float, _: float) -> np.ndarray:
    labels, distance = voronoi(rng, size, 1.5 * wavelength_px)
    values = rng.random(int(labels.max()) + 1, dtype=np.float32)
    return np.clip(0.6 * values[labels] + 0.5 - 0.6 * distance, 0, 1)


def _spots(rng: Generator, size: tuple[int, int], wavelength_px: float, _: float) -> np.ndarray:
    return np.clip((noise(rng, size, wavelength_px) - rng.uniform(0.4, 0.65)) * 6 + 0.5, 0, 1)


def _foliage(rng: Generator, size: tuple[int, int], wavelength_px: float, _: float) -> np.ndarray:
    coarse = noise(rng, size, 2.5 * wavelength_px, octaves=2)
    fine = noise(rng, size, 0.5 * wavelength_px, stretch=2, angle=rng.uniform(0, 3))
    return np.clip(coarse + 1.4 * (fine - 0.5), 0, 1)


def _creases(rng: Generator, size: tuple[int, int], wavelength_px: float, _: float) -> np.ndarray:
    """Thin dark lines and soft light between them: folds, cracks, veins."""
    folds = noise(rng, size, 3 * wavelength_px, octaves=2)
    lines = np.abs(noise(rng, size, 2 * wavelength_px, octaves=2) - 0.5)
    return np.clip(0.75 * folds + 0.2 - 0.5 * np.clip(1 - 14 * lines, 0, 1), 0, 1)


def _weave(rng: Generator, size: tuple[int, int], wavelength_px: float, angle: float) -> np.ndarray:
    along, across = _axes(size, 0.5 * wavelength_px, angle)
    bend = _warped(rng, size, wavelength_px, 2.0)
    return 0.5 + 0.5 * np.sin(np.pi * (along + bend)) * np.sin(np.pi * (across - bend))


def _speckle(rng: Generator, size: tuple[int, int], wavelength_px: float, _: float) -> np.ndarray:
    return noise(rng, size, 2.0) * noise(rng, size, 2 * wavelength_px, octaves=2) * 1.6


Pattern = Callable[[Generator, tuple[int, int], float, float], np.ndarray]
PATTERNS: dict[str, Pattern] = {
    "plain": _plain,
    "gradient": _gradient,
    "fractal": _fractal,
    "fibres": _fibres,
    "stripes": _stripes,
    "rings": _rings,
    "tiles": _tiles,
    "cobbles": _cobbles,
    "spots": _spots,
    "foliage": _foliage,
    "creases": _creases,
    "weave": _weave,
    "speckle": _speckle,
}
SMOOTH = ("plain", "gradient", "fractal", "creases")
ROUGH = ("fractal", "foliage", "fibres", "cobbles", "speckle", "creases")
EVERY = tuple(PATTERNS)

# Hue (turns), saturation and value of common surfaces: earth, leaf, sky, stone, skin, wood, brick.
NATURAL_HSV = np.array(
    [
        [0.08, 0.45, 0.45],
        [0.25, 0.5, 0.4],
        [0.58, 0.35, 0.8],
        [0.1, 0.08, 0.55],
        [0.06, 0.4, 0.75],
        [0.09, 0.55, 0.35],
        [0.02, 0.55, 0.5],
    ]
)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """Colours (..., 3) from hue in turns, saturation and value to RGB in [0, 1]."""
    hue, saturation, value = np.moveaxis(np.asarray(hsv, np.float64), -1, 0)
    sector = (np.array([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6
    dip = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * dip)


def random_hsv(rng: Generator) -> np.ndarray:
    """A colour: most often that of a common surface, else grey, else anything."""
    kind = rng.random()
    if kind < 0.5:
        hsv = rng.choice(NATURAL_HSV) + rng.normal(0, [0.03, 0.12, 0.17])
    elif kind < 0.75:
        hsv = np.array([rng.random(), rng.uniform(0, 0.15), rng.beta(1.1, 1.1)])
    else:
        hsv = rng.uniform([0, 0.25, 0.3], [1, 0.95, 1])
    return np.clip(hsv, [-1, 0, 0.05], [2, 1, 0.97])


def colour_ramp(rng: Generator, hsv: np.ndarray, contrast: float) -> np.ndarray:
    """(256, 3) float32 RGB: from a darker through the given to a lighter or foreign colour."""
    dark = hsv + rng.normal(0, [0.02, 0.05, 0.02]) - [0, 0, contrast * hsv[2]]
    light = hsv + rng.normal(0, [0.02, 0.08, 0.02]) + [0, -0.2 * contrast, contrast * 0.8]
    if rng.random() < 0.2 * (contrast > 0.3):
        light = random_hsv(rng)
    stops = hsv_to_rgb(np.clip([dark, hsv, light], [-1, 0, 0.01], [2, 1, 1]))
    knots = (0, rng.uniform(90, 165), 255)
    ramp = np.empty((256, 3), np.float32)
    for channel in range(3):
        ramp[:, channel] = np.interp(LEVELS, knots, stops[:, channel])
    return ramp


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a thing is made of; two things of one material look alike without being copies.

    Attributes:
        ramp: (256, 3) float32 RGB, what the pattern's values 0 to 1 look like.
        pattern: a name of `PATTERNS`.
        wavelength_px: how coarse the pattern is.
        angle: the pattern's direction, in radians.
        roughness: strength of the fine grain over the pattern, a fraction of its brightness.
        unevenness: strength of the broad light and dark over it, likewise.
        gloss: strength of highlights, from 0 (matt) to 1.
    """

    ramp: np.ndarray
    pattern: str
    wavelength_px: float
    angle: float
    roughness: float
    unevenness: float = 0.0
    gloss: float = 0.0

    def render(self, rng: Generator, size: tuple[int, int]) -> np.ndarray:
        """A new piece of this material, (H, W, 3) float32 RGB."""
        values = PATTERNS[self.pattern](rng, size, self.wavelength_px, self.angle)
        surface = np.take(self.ramp, (values * 255).astype(np.uint8), axis=0, mode="clip")
        grain = noise(rng, size, 1.7) - np.float32(0.5)
        if self.unevenness:
            broad = noise(rng, size, 0.6 * max(size), octaves=2) - np.float32(0.5)
            cv2.scaleAdd(broad, self.unevenness / max(self.roughness, 1e-3), grain, dst=grain)
        surface *= (1 + np.float32(2 * self.roughness) * grain)[..., None]
        return surface

    def relative(self, rng: Generator, *, shift: float = 0.08) -> Material:
        """A material of nearly this colour with a pattern of its own, as camouflage has."""
        other = random_material(rng, self.wavelength_px)
        ramp = np.clip(self.ramp + rng.normal(0, shift, 3).astype(np.float32), 0, 1)
        return replace(other, ramp=ramp, roughness=self.roughness)


def random_material(
    rng: Generator,
    wavelength_px: float,
    *,
    patterns: tuple[str, ...] = EVERY,
    hsv: np.ndarray | None = None,
    contrast: float | None = None,
) -> Material:
    """Draws a material whose pattern is about `wavelength_px` coarse."""
    hsv = random_hsv(rng) if hsv is None else hsv
    contrast = rng.triangular(0.05, 0.2, 0.75) if contrast is None else contrast
    return Material(
        ramp=colour_ramp(rng, hsv, contrast),
        pattern=str(rng.choice(patterns)),
        wavelength_px=float(max(wavelength_px * rng.lognormal(0, 0.5), 2.5)),
        angle=float(rng.choice([0.0, np.pi / 2, rng.uniform(0, np.pi)])),
        roughness=float(rng.beta(1.5, 5) * 0.6),
        unevenness=float(rng.uniform(0, 0.7)),
        gloss=float(max(rng.uniform(-1, 1), 0)),
    )
