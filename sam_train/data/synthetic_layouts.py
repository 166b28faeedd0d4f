"""Whole scenes: what stands where, and what lies behind it.

A layout paints a `Canvas` and leaves its masks there. It returns whether the picture is grey.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator

from sam_train.data import synthetic_shapes as shapes
from sam_train.data.synthetic_canvas import Canvas
from sam_train.data.synthetic_objects import Part, Thing, random_thing
from sam_train.data.synthetic_shapes import affine, ellipse, rasterise, transform, tube
from sam_train.data.synthetic_textures import (
    EVERY,
    ROUGH,
    SMOOTH,
    Material,
    noise,
    random_material,
    voronoi,
)


def _wavelength(rng: Generator, canvas: Canvas) -> float:
    return float(rng.uniform(4, 22)) * canvas.unit_px


def _below(
    rng: Generator, size: tuple[int, int], height: float, *, wild: float = 0.0, slope: float = 0.0
) -> np.ndarray:
    """Coverage of what lies below a skyline at a fraction `height` of the frame."""
    h, w = size
    x = np.linspace(0, 1, 65)
    octaves = 2.0 ** np.arange(1, 6)[:, None]
    waves = np.sin(2 * np.pi * (octaves * x / 1.5 + rng.random((5, 1)))) * rng.normal(0, 1, (5, 1))
    y = height + slope * (x - 0.5) + wild * (waves / octaves).sum(0)
    edge = np.stack([x * w, y * h], -1)
    return rasterise([[np.concatenate([edge, [[w, 2 * h], [0, 2 * h]]])]], size)


def _stuff(
    rng: Generator, canvas: Canvas, alpha: np.ndarray, material: Material, *, annotated: bool = True
) -> None:
    canvas.paint(rng, alpha, material)
    if annotated:
        canvas.annotate(alpha > 127)


def _everywhere(canvas: Canvas) -> np.ndarray:
    return np.full(canvas.size, 255, np.uint8)


def outdoor(rng: Generator, canvas: Canvas) -> float:
    """Sky or leaves, hills or houses, ground, at times a path; returns the ground's height."""
    horizon = rng.uniform(0.15, 0.7)
    far = SMOOTH if rng.random() < 0.7 else ROUGH
    sky = random_material(rng, 3 * _wavelength(rng, canvas), patterns=far, contrast=0.25)
    _stuff(rng, canvas, _everywhere(canvas), sky)
    for lift in sorted(rng.uniform(0.03, 0.4, rng.integers(0, 3)), reverse=True):
        hills = random_material(rng, _wavelength(rng, canvas), patterns=ROUGH)
        wild = rng.choice([0.02, 0.06, 0.12])
        _stuff(rng, canvas, _below(rng, canvas.size, horizon - lift, wild=wild), hills)
    ground = random_material(rng, _wavelength(rng, canvas), patterns=(*ROUGH, "plain", "tiles"))
    slope = rng.normal(0, 0.08)
    _stuff(rng, canvas, _below(rng, canvas.size, horizon, wild=0.01, slope=slope), ground)
    if rng.random() < 0.35:
        h, w = canvas.size
        x0, x1, spread = rng.uniform(0, w), rng.uniform(0, w), rng.uniform(0.1, 0.5) * w
        y0, thin = (horizon + 0.08) * h, 0.1 * spread
        path = np.array(
            [[x0 - thin, y0], [x0 + thin, y0], [x1 + spread, h + 2], [x1 - spread, h + 2]]
        )
        surface = random_material(rng, _wavelength(rng, canvas))
        _stuff(rng, canvas, rasterise([[path]], canvas.size), surface)
    return horizon


def indoor(rng: Generator, canvas: Canvas) -> float:
    """Walls that meet in a corner, a floor or table, pictures and doors; returns the floor's height."""
    h, w = canvas.size
    floor_y = rng.uniform(0.4, 0.85)
    wall = random_material(
        rng, 2 * _wavelength(rng, canvas), patterns=(*SMOOTH, "stripes", "tiles")
    )
    _stuff(rng, canvas, _everywhere(canvas), wall)
    if rng.random() < 0.4:
        corner, lean = rng.uniform(0.15, 0.85) * w, rng.normal(0, 0.04) * w
        side = np.array([[corner, -2], [w + 2, -2], [w + 2, h], [corner + lean, h]])
        other = wall.relative(rng, shift=0.1) if rng.random() < 0.5 else random_material(rng, 20)
        _stuff(rng, canvas, rasterise([[side]], canvas.size), other)
    for _ in range(int(rng.integers(0, 4))):
        place = affine(rng.random(2) * [w, floor_y * h], rng.uniform(0.06, 0.22, 2) * min(h, w))
        frame = transform(shapes.box(-1, -1, 1, 1), place)
        picture = transform(shapes.box(-0.8, -0.8, 0.8, 0.8), place)
        thing = [
            Part(outline=frame, material=random_material(rng, 8), annotated=False),
            Part(outline=picture, material=random_material(rng, _wavelength(rng, canvas))),
        ]
        canvas.place(rng, thing, affine((0, 0), (1, 1)), parts=rng.random() < 0.4)
    floor = random_material(rng, _wavelength(rng, canvas), patterns=EVERY)
    slope = rng.choice([0.0, rng.normal(0, 0.15)])
    _stuff(rng, canvas, _below(rng, canvas.size, floor_y, slope=slope), floor)
    return floor_y


def _regions(rng: Generator, canvas: Canvas, count: float, bend_px: float) -> np.ndarray:
    """About `count` numbered cells that tile the frame, their borders bent; (H, W) float32."""
    h, w = canvas.size
    small = max(h // 4, 1), max(w // 4, 1)
    labels, _ = voronoi(rng, small, float(np.sqrt(small[0] * small[1] / count)))
    wave = float(rng.uniform(15, 70)) * canvas.unit_px
    y, x = np.mgrid[:h, :w].astype(np.float32)
    x += bend_px * (noise(rng, (h, w), wave, octaves=3) - 0.5)
    y += bend_px * (noise(rng, (h, w), wave, octaves=3) - 0.5)
    # A larger picture of the cells, so that bending shows no steps of four pixels.
    labels = cv2.resize(labels.astype(np.float32), (w, h), interpolation=cv2.INTER_NEAREST)
    return cv2.remap(labels, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)


def patchwork(rng: Generator, canvas: Canvas) -> float:
    """Regions side by side, as in pictures from the air or of heaps of cloth."""
    regions = _regions(rng, canvas, rng.uniform(3, 9), rng.uniform(0, 60) * canvas.unit_px)
    for label in np.unique(regions):
        alpha = cv2.blur((regions == label).astype(np.uint8) * 255, (3, 3))
        _stuff(rng, canvas, alpha, random_material(rng, _wavelength(rng, canvas)))
    return float(rng.uniform(0, 0.5))


def backdrop(rng: Generator, canvas: Canvas) -> float:
    """One surface behind everything, too large to be a mask."""
    material = random_material(rng, _wavelength(rng, canvas))
    _stuff(rng, canvas, _everywhere(canvas), material, annotated=False)
    return 0.0


def photo(rng: Generator, canvas: Canvas) -> bool:
    """An everyday picture: a setting, and things of all sizes in it, far ones first."""
    h, w = canvas.size
    setting = (outdoor, indoor, patchwork, backdrop)[rng.choice(4, p=[0.42, 0.34, 0.14, 0.1])]
    ground = setting(rng, canvas)
    if rng.random() < 0.3:
        cv2.GaussianBlur(
            canvas.image, (0, 0), rng.uniform(1, 3.5) * canvas.unit_px, dst=canvas.image
        )
    shadow = max(rng.uniform(-0.3, 0.6), 0.0)
    relief = rng.uniform(0.1, 0.8)
    detailed = 0.6 if rng.random() < 0.5 else 0.1
    count = int(rng.integers(3, 9))
    for depth in np.sort(rng.random(count)):
        thing, standing = random_thing(rng, _wavelength(rng, canvas))
        half = min(h, w) * np.exp(rng.uniform(np.log(0.13), np.log(0.42))) * (0.65 + 0.6 * depth)
        for _ in range(int(rng.integers(2, 4)) if rng.random() < 0.12 else 1):
            foot = ground + (1.08 - ground) * depth + rng.normal(0, 0.02)
            y = foot * h - half if standing else rng.uniform(0.1, 0.95) * h
            turn = rng.normal(0, 0.06) if standing else rng.uniform(0, 2 * np.pi)
            stretch = rng.lognormal(0, 0.2)
            scale = half * np.array([stretch * rng.choice([-1, 1]), 1 / stretch])
            matrix = affine((rng.uniform(0.02, 0.98) * w, y), scale, turn)
            parts = rng.random() < detailed
            canvas.place(rng, thing, matrix, parts=parts, shadow=shadow, relief=relief)
    canvas.expose(rng)
    return bool(rng.random() < 0.1)


def closeup(rng: Generator, canvas: Canvas) -> bool:
    """One or two large things and their parts before a blurred background."""
    h, w = canvas.size
    (outdoor, indoor, backdrop)[rng.integers(3)](rng, canvas)
    blur = rng.uniform(0.5, 6) * canvas.unit_px
    cv2.GaussianBlur(canvas.image, (0, 0), blur, dst=canvas.image)
    relief = rng.uniform(0.2, 0.9)
    for _ in range(int(rng.integers(2, 5))):
        thing, standing = random_thing(rng, 2 * _wavelength(rng, canvas))
        half = min(h, w) * rng.uniform(0.25, 0.6)
        turn = rng.normal(0, 0.1) if standing else rng.uniform(0, 2 * np.pi)
        matrix = affine(
            rng.uniform(0.15, 0.85, 2) * [w, h], (half * rng.choice([-1, 1]), half), turn
        )
        canvas.place(rng, thing, matrix, parts=rng.random() < 0.7, relief=relief, shadow=0.3)
    canvas.expose(rng)
    return bool(rng.random() < 0.1)


def heap(rng: Generator, canvas: Canvas) -> bool:
    """Many things of one or two kinds that lie over one another: fruit, stones, shells."""
    h, w = canvas.size
    backdrop(rng, canvas)
    kinds: list[tuple[Callable[[Generator], shapes.Outline], Material]] = [
        (
            shapes.COMPACT[rng.integers(len(shapes.COMPACT))],
            random_material(rng, 0.6 * _wavelength(rng, canvas)),
        )
        for _ in range(rng.integers(1, 4))
    ]
    half = min(h, w) * rng.uniform(0.08, 0.2)
    shadow, relief = rng.uniform(0.2, 0.7), rng.uniform(0.4, 1.0)
    for _ in range(int(rng.integers(6, 18))):
        shape, material = kinds[rng.integers(len(kinds))]
        if rng.random() < 0.3:
            material = material.relative(rng)
        scale = half * rng.lognormal(0, 0.2, 2)
        matrix = affine(rng.uniform(0.05, 0.95, 2) * [w, h], scale, rng.uniform(0, 2 * np.pi))
        part = Part(outline=shape(rng), material=material)
        canvas.place(rng, [part], matrix, shadow=shadow, relief=relief)
    canvas.expose(rng)
    return bool(rng.random() < 0.1)


def _cell(rng: Generator, material: Material, nucleus: Material | None) -> Thing:
    body = shapes.blob(rng, 0.2) if rng.random() < 0.85 else shapes.spindle(rng)
    thing = [Part(outline=body, material=material, annotated=False)]
    if nucleus is not None:
        place = affine(rng.uniform(-0.2, 0.2, 2), rng.uniform(0.3, 0.55, 2))
        thing.append(Part(outline=transform(shapes.blob(rng, 0.15), place), material=nucleus))
    return thing


def microscopy(rng: Generator, canvas: Canvas) -> bool:
    """Crowded cells: fluorescent on black, stained on pale tissue, or grey in phase contrast."""
    h, w = canvas.size
    wave = 0.5 * _wavelength(rng, canvas)
    kind = rng.choice(["fluorescent", "stained", "phase"], p=[0.4, 0.35, 0.25])
    hue = rng.random()
    if kind == "fluorescent":
        saturation = rng.choice([0.0, rng.uniform(0.4, 1)])
        ground = np.array([hue, saturation, rng.uniform(0.02, 0.12)])
        cell = np.array([hue, saturation, rng.uniform(0.3, 0.75)])
    elif kind == "stained":
        hue = rng.uniform(0.68, 0.95)
        ground = np.array([hue + 0.08, rng.uniform(0.05, 0.35), rng.uniform(0.75, 0.95)])
        cell = np.array([hue, rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.65)])
    else:
        ground = np.array([hue, 0.03, rng.uniform(0.35, 0.7)])
        cell = ground + [0, 0, rng.choice([-0.15, 0.15])]
    surface = random_material(
        rng, 3 * wave, patterns=("fractal", "plain", "fibres", "speckle"), hsv=ground, contrast=0.2
    )
    _stuff(rng, canvas, _everywhere(canvas), surface, annotated=False)
    nucleated = rng.random() < 0.3
    half = min(h, w) * rng.uniform(0.045, 0.13) * (1.6 if nucleated else 1)
    stretch = rng.uniform(0.55, 1)
    grouped = rng.random() < 0.4
    middle = rng.uniform(0.2, 0.8, 2)
    for _ in range(int(rng.integers(8, 25))):
        tone = np.clip(cell + rng.normal(0, [0.015, 0.07, 0.1]), [-1, 0, 0.12], [2, 1, 1])
        inner = np.clip(tone * [1, 1.2, rng.uniform(0.4, 0.8)], [-1, 0, 0.03], [2, 1, 1])
        body = random_material(
            rng, wave, patterns=("fractal", "speckle", "spots"), hsv=tone, contrast=0.4
        )
        core = random_material(rng, wave, patterns=("fractal", "speckle"), hsv=inner, contrast=0.4)
        centre = rng.normal(middle, 0.2) if grouped else rng.random(2)
        size = half * rng.lognormal(0, 0.2) * np.array([1, stretch])
        thing = _cell(rng, body, core if nucleated else None)
        matrix = affine(centre * [w, h], size, rng.uniform(0, 2 * np.pi))
        relief = 0.35 if kind != "stained" else 0.1
        canvas.place(rng, thing, matrix, parts=True, relief=relief)
    cv2.GaussianBlur(canvas.image, (0, 0), rng.uniform(0.5, 1.3) * canvas.unit_px, dst=canvas.image)
    return bool(kind == "phase")


def tissue(rng: Generator, canvas: Canvas) -> bool:
    """Cells wall to wall with membranes between them, or stones, scales and tiles."""
    membrane = random_material(rng, _wavelength(rng, canvas))
    _stuff(rng, canvas, _everywhere(canvas), membrane, annotated=False)
    base = random_material(rng, 0.7 * _wavelength(rng, canvas))
    kind = base.relative(rng)
    regions = _regions(rng, canvas, rng.uniform(8, 24), rng.uniform(0, 40) * canvas.unit_px)
    width = max(2, int(rng.uniform(1, 5) * canvas.unit_px)) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width + 2, width + 2))
    for label in np.unique(regions):
        region = cv2.erode((regions == label).astype(np.uint8) * 255, kernel)
        region = cv2.blur(region, (3, 3))
        material = base if rng.random() < 0.5 else kind
        canvas.paint(rng, region, material.relative(rng, shift=0.06), relief=rng.uniform(0, 0.6))
        canvas.annotate(region > 127)
    return bool(rng.random() < 0.3)


def _tint(canvas: Canvas, alpha: np.ndarray, factor: np.ndarray | float) -> None:
    """Makes what is there lighter or darker, as overlapping shadows of X-rays do."""
    canvas.image *= (1 + alpha.astype(np.float32) / 255 * (factor - 1))[..., None]


def ultrasound(rng: Generator, canvas: Canvas) -> bool:
    """Speckled layers with dark lesions and the shadows behind them."""
    h, w = canvas.size
    grey = np.array([0.6, 0.0, 0.5])
    height = 0.0
    for index in range(int(rng.integers(2, 5))):
        tone = grey * [1, 1, rng.uniform(0.35, 1.3)]
        wave = float(rng.uniform(8, 26)) * canvas.unit_px
        layer = random_material(rng, wave, patterns=("fibres", "speckle"), hsv=tone, contrast=0.7)
        layer = Material(ramp=layer.ramp, pattern=layer.pattern, wavelength_px=layer.wavelength_px,
                         angle=float(rng.normal(0, 0.15)), roughness=0.4)  # fmt: skip
        alpha = _below(rng, (h, w), height, wild=0.04 if index else 0.0, slope=rng.normal(0, 0.05))
        _stuff(rng, canvas, alpha, layer)
        height += rng.uniform(0.12, 0.4)
    for _ in range(int(rng.integers(1, 4))):
        half = rng.uniform(0.07, 0.25, 2) * min(h, w)
        centre = rng.uniform(0.15, 0.85, 2) * [w, h]
        below = shapes.box(centre[0] - half[0], centre[1], centre[0] + half[0], 2 * h)
        beam = cv2.blur(rasterise(below, (h, w)), (15, 15))
        _tint(canvas, beam, rng.uniform(0.5, 1.4))
        tone = grey * [1, 1, rng.uniform(0.1, 0.4)]
        inside = random_material(rng, 12, patterns=("speckle", "fractal"), hsv=tone, contrast=0.6)
        lesion = transform(shapes.blob(rng, 0.3), affine(centre, half, rng.normal(0, 0.3)))
        canvas.place(rng, [Part(outline=lesion, material=inside)], affine((0, 0), (1, 1)))
    speckle = noise(rng, (h, w), 2.2 * canvas.unit_px + 0.5, stretch=2.0)
    canvas.image *= (0.35 + 1.3 * speckle)[..., None]
    return True


def radiograph(rng: Generator, canvas: Canvas) -> bool:
    """Soft overlapping shadows: a body, organs, bones and ribs across them."""
    h, w = canvas.size
    side = min(h, w) / 2
    frame = affine((w / 2 + rng.normal(0, 8), h / 2), (side, side), rng.normal(0, 0.08))
    soft = int(9 * canvas.unit_px) | 1

    def shadow(outline: shapes.Outline, factor: float, *, sharp: bool = False) -> np.ndarray:
        alpha = rasterise(transform(outline, frame), (h, w))
        _tint(canvas, alpha if sharp else cv2.blur(alpha, (soft, soft)), factor)
        return alpha > 127

    canvas.image += np.float32(rng.uniform(0.05, 0.2))
    body = transform(shapes.superellipse(rng), affine((0, 0.1), (1.1, rng.uniform(1, 1.6))))
    canvas.annotate(shadow(body, rng.uniform(3, 5)))
    organs = []
    for x in (-0.42, 0.42):
        place = affine((x, rng.normal(0, 0.1)), (rng.uniform(0.25, 0.36), rng.uniform(0.5, 0.75)))
        lobe = transform(shapes.blob(rng, 0.18), place)
        organs.append(shadow(lobe, rng.uniform(0.3, 0.55)))
    for _ in range(int(rng.integers(1, 3))):
        place = affine(rng.uniform(-0.5, 0.5, 2), rng.uniform(0.12, 0.3, 2))
        organs.append(shadow(transform(shapes.blob(rng, 0.2), place), rng.uniform(1.3, 1.7)))
    spine = shadow(tube(np.array([[0, -1.2], [0.03, 0], [0, 1.2]]), rng.uniform(0.08, 0.14)), 1.4)
    for y in np.arange(-0.8, 0.9, rng.uniform(0.16, 0.24)):
        for x in (-1, 1):
            rib = np.array([[0.0, y - 0.05], [0.45 * x, y - 0.12], [0.85 * x, y + 0.25]])
            shadow(tube(rib, rng.uniform(0.025, 0.05)), 1.2)
    for mask in (*organs, spine):
        canvas.annotate(mask)
    if rng.random() < 0.5:
        coin = ellipse(tuple(rng.uniform(-0.7, 0.7, 2)), (0.07, 0.07))
        canvas.annotate(shadow(coin, 1.8, sharp=True))
    canvas.image *= (0.8 + 0.4 * noise(rng, (h, w), 12 * canvas.unit_px, octaves=3))[..., None]
    canvas.expose(rng)
    return True


Layout = Callable[[Generator, Canvas], bool]
LAYOUTS: tuple[tuple[Layout, float], ...] = (
    (photo, 0.54),
    (closeup, 0.13),
    (heap, 0.09),
    (microscopy, 0.12),
    (tissue, 0.05),
    (ultrasound, 0.04),
    (radiograph, 0.03),
)
"""Each layout and how large a share of the scenes it makes."""
