"""Things made of parts for synthetic scenes: creatures, people, vehicles, vessels, trees, signs.

A thing is a list of `Part`s from back to front, in the unit frame of `synthetic_shapes`. Each part
has its own surface and may be a mask of its own; together they are the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from sam_train.data import synthetic_shapes as shapes
from sam_train.data.synthetic_shapes import Outline, affine, box, ellipse, transform, tube
from sam_train.data.synthetic_textures import (
    ROUGH,
    SMOOTH,
    Material,
    random_material,
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a thing.

    Attributes:
        outline: in the unit frame.
        material: its surface.
        annotated: whether an annotator who looks for parts would outline it.
        inside: painted only on what is there of the thing already, such as a label on a bottle.
    """

    outline: Outline
    material: Material
    annotated: bool = True
    inside: bool = False


Thing = list[Part]


def simple(rng: Generator, wavelength_px: float) -> Thing:
    """One silhouette, at times with a patch, a hole or a second half of another surface."""
    family = shapes.THIN if rng.random() < 0.25 else shapes.COMPACT
    outline = family[rng.integers(len(family))](rng)
    material = random_material(rng, wavelength_px)
    if family is shapes.COMPACT and len(outline[0]) == 1 and rng.random() < 0.12:
        hole = transform(shapes.blob(rng), affine(rng.uniform(-0.15, 0.15, 2), (0.35, 0.3)))
        outline = [[*outline[0], *hole[0]]]
    thing = [Part(outline=outline, material=material, annotated=False)]
    extra = rng.random()
    if family is shapes.COMPACT and extra < 0.3:
        patch = shapes.COMPACT[rng.integers(len(shapes.COMPACT))](rng)
        place = affine(rng.uniform(-0.35, 0.35, 2), rng.uniform(0.2, 0.55, 2), rng.uniform(0, 6))
        second = random_material(rng, wavelength_px)
        thing.append(Part(outline=transform(patch, place), material=second, inside=True))
    elif family is shapes.COMPACT and extra < 0.45:
        half = transform(box(-2, 0, 2, 3), affine(rng.normal(0, 0.2, 2), (1, 1), rng.uniform(0, 6)))
        second = material.relative(rng, shift=0.15)
        thing.append(Part(outline=half, material=second, inside=True))
    return thing


def creature(rng: Generator, wavelength_px: float) -> Thing:
    """Four legs, body, neck, head, ears and tail in one coat, from the side."""
    coat = random_material(rng, wavelength_px, patterns=(*ROUGH, "plain", "spots", "stripes"))
    body_y, body_r, leg = rng.uniform(-0.15, 0.15), rng.uniform(0.22, 0.4), rng.uniform(0.05, 0.11)
    shoulder, hip = np.array([0.42, body_y]), np.array([-0.48, body_y + rng.uniform(-0.05, 0.05)])
    head = np.array([rng.uniform(0.65, 0.85), body_y - rng.uniform(0.1, 0.7)])
    head_r = rng.uniform(0.13, 0.23)
    legs: list[Outline] = []
    for x in (-0.6, -0.42, 0.3, 0.48):
        knee = np.array([x + rng.normal(0, 0.08), (body_y + 1) / 2])
        foot = np.array([x + rng.normal(0, 0.12), 1 - leg])
        legs.append(tube(np.stack([[x, body_y], knee, foot]), np.array([1.8, 1.1, 0.9]) * leg))
    tail = np.stack([hip, hip + [-0.3, -0.05], hip + [-0.42, rng.uniform(-0.5, 0.4)]])
    torso = tube(np.stack([hip, shoulder]), np.array([rng.uniform(0.8, 1.1), 1.0]) * body_r)
    neck = tube(np.stack([shoulder, head]), np.array([0.7 * body_r, 0.8 * head_r]))
    muzzle = head + np.array([1.3, rng.uniform(0.2, 0.8)]) * head_r
    skull = [
        *ellipse((head[0], head[1]), (1.2 * head_r, head_r)),
        *tube(np.stack([head, muzzle]), [0.8 * head_r, 0.5 * head_r]),
    ]
    ear = ellipse(
        (head[0] - 0.6 * head_r, head[1] - 0.8 * head_r), (0.35 * head_r, 0.8 * head_r), -0.4
    )
    eye = ellipse(
        (head[0] + 0.35 * head_r, head[1] - 0.25 * head_r), (0.14 * head_r, 0.14 * head_r)
    )
    shade = coat.relative(rng, shift=0.04) if rng.random() < 0.5 else coat
    dark = random_material(rng, wavelength_px, hsv=np.array([0.1, 0.1, 0.06]), contrast=0.1)
    return [
        Part(outline=tube(tail, 0.05), material=coat, annotated=False),
        *(Part(outline=limb, material=shade, annotated=False) for limb in legs[::2]),
        *(Part(outline=limb, material=coat, annotated=False) for limb in legs[1::2]),
        Part(outline=[*torso, *neck], material=coat),
        Part(outline=skull, material=coat),
        Part(outline=ear, material=shade, annotated=False),
        Part(outline=eye, material=dark, annotated=False),
    ]


def person(rng: Generator, wavelength_px: float) -> Thing:
    """Shoes, trousers, shirt, arms, head and hair, standing or striding."""
    skin_hsv = np.array([0.06, rng.uniform(0.25, 0.6), rng.uniform(0.3, 0.9)])
    skin = random_material(rng, wavelength_px, patterns=SMOOTH, hsv=skin_hsv, contrast=0.15)
    trousers, shirt, hair, shoe = (random_material(rng, wavelength_px) for _ in range(4))
    step, width = rng.uniform(0.02, 0.35), rng.uniform(0.17, 0.28)
    hips, neck = np.array([0.0, 0.1]), np.array([rng.normal(0, 0.05), -0.55])
    legs: Outline = []
    shoes: Outline = []
    for side in (-1, 1):
        foot = np.array([side * (0.1 + step), 0.92])
        knee = np.array([side * (0.1 + 0.4 * step) + rng.normal(0, 0.05), 0.5])
        legs += tube(np.stack([hips + [side * 0.08, 0], knee, foot]), [0.13, 0.1, 0.07])
        shoes += tube(np.stack([foot, foot + [rng.uniform(-0.1, 0.14), 0.03]]), 0.06)
    arms: Outline = []
    hands: Outline = []
    for side in (-1, 1):
        shoulder = neck + [side * width, 0.1]
        elbow = shoulder + [side * rng.uniform(0, 0.25), rng.uniform(0.1, 0.3)]
        hand = elbow + [rng.uniform(-0.2, 0.25) * side, rng.uniform(-0.3, 0.3)]
        arms += tube(np.stack([shoulder, elbow]), [0.085, 0.07])
        hands += tube(np.stack([elbow, hand]), [0.06, 0.05])
    torso = tube(np.stack([neck + [0, 0.15], hips]), np.array([width, 0.9 * width]))
    head = neck + [0, -0.2]
    face = ellipse((head[0], head[1]), (0.13, 0.17))
    crown = ellipse((head[0] - 0.02, head[1] - 0.07), (0.16, 0.14), rng.normal(0, 0.4))
    return [
        Part(outline=shoes, material=shoe, annotated=False),
        Part(outline=legs, material=trousers),
        Part(outline=hands, material=skin if rng.random() < 0.6 else shirt, annotated=False),
        Part(outline=torso + arms, material=shirt),
        Part(outline=crown, material=hair, annotated=False),
        Part(outline=face, material=skin),
    ]


def vehicle(rng: Generator, wavelength_px: float) -> Thing:
    """A body with a cabin, windows and wheels."""
    paint = random_material(rng, wavelength_px, patterns=("plain", "gradient", "stripes", "tiles"))
    glass = random_material(rng, wavelength_px, patterns=("gradient", "fractal"), contrast=0.7)
    rubber = random_material(rng, wavelength_px, hsv=np.array([0.6, 0.05, 0.14]))
    metal = random_material(rng, wavelength_px, hsv=np.array([0.6, 0.05, 0.6]))
    floor, deck, roof = 0.45, rng.uniform(-0.15, 0.15), rng.uniform(-0.75, -0.4)
    front, back = rng.uniform(0.2, 0.95), rng.uniform(-0.95, -0.3)
    lean = rng.uniform(0.05, 0.3, 2)
    body = box(-1, deck, 1, floor)
    cabin = [
        [np.array([[back + lean[0], roof], [front - lean[1], roof], [front, deck], [back, deck]])]
    ]
    middle = (back + front) / 2 + rng.uniform(-0.1, 0.1)
    top, bottom = roof + 0.1, deck - 0.06
    windows = [
        [np.array([[back + lean[0] + 0.05, top], [middle - 0.04, top], [middle - 0.04, bottom], [back + 0.14, bottom]])],
        [np.array([[middle + 0.04, top], [front - lean[1] - 0.05, top], [front - 0.14, bottom], [middle + 0.04, bottom]])],
    ]  # fmt: skip
    thing = [
        Part(outline=[*cabin, *body], material=paint, annotated=False),
        Part(outline=windows, material=glass),
    ]
    radius = rng.uniform(0.17, 0.26)
    for x in (-0.6 + rng.uniform(-0.1, 0.1), 0.6 + rng.uniform(-0.1, 0.1)):
        thing.append(Part(outline=ellipse((x, floor), (radius, radius)), material=rubber))
        hub = ellipse((x, floor), (radius * 0.55, radius * 0.55))
        thing.append(Part(outline=hub, material=metal, annotated=False))
    return thing


def cycle(rng: Generator, wavelength_px: float) -> Thing:
    """Two rings and thin bars: mostly holes."""
    frame = random_material(rng, wavelength_px, patterns=SMOOTH)
    tyre = random_material(rng, wavelength_px, patterns=SMOOTH, hsv=np.array([0.6, 0.05, 0.15]))
    radius, width = rng.uniform(0.36, 0.45), rng.uniform(0.03, 0.06)
    wheels: list[Outline] = []
    hubs = np.array([[-0.55, 0.5], [0.55, 0.5]])
    for hub in hubs:
        outer = ellipse((hub[0], hub[1]), (radius, radius))[0][0]
        inner = ellipse((hub[0], hub[1]), (radius - 2 * width, radius - 2 * width))[0][0]
        turn = np.arange(5) * np.pi / 5
        rim = 0.9 * radius * np.stack([np.cos(turn), np.sin(turn)], -1)
        spokes = [tube(np.stack([hub - end, hub + end]), 0.012)[0] for end in rim]
        wheels.append([[outer, inner], *spokes])
    saddle, bars, pedals = np.array([-0.25, -0.25]), np.array([0.4, -0.35]), np.array([0.0, 0.45])
    lines = [(hubs[0], saddle), (saddle, bars), (bars, hubs[1]), (pedals, bars), (hubs[0], pedals), (pedals, saddle)]  # fmt: skip
    tubes: Outline = []
    for pair in lines:
        tubes += tube(np.stack(pair), width)
    tubes += tube(np.stack([saddle + [-0.12, -0.06], saddle + [0.12, -0.06]]), 0.05)
    return [*(Part(outline=w, material=tyre) for w in wheels), Part(outline=tubes, material=frame)]


def vessel(rng: Generator, wavelength_px: float) -> Thing:
    """A turned profile with a label, a cap or a shade."""
    body = random_material(rng, wavelength_px, patterns=("plain", "gradient", "stripes", "fractal"))
    thing = [Part(outline=shapes.lathe(rng), material=body, annotated=False)]
    top = rng.uniform(-0.85, -0.3)
    if rng.random() < 0.7:
        label = box(-2, rng.uniform(-0.2, 0.2), 2, rng.uniform(0.3, 0.9))
        thing.append(Part(outline=label, material=random_material(rng, wavelength_px), inside=True))
    if rng.random() < 0.6:
        cap = random_material(rng, wavelength_px)
        thing.append(Part(outline=box(-2, -2, 2, top), material=cap, inside=True))
    return thing


def tree(rng: Generator, wavelength_px: float) -> Thing:
    """A forked trunk, bare or under a crown of leaves."""
    bark = random_material(
        rng, wavelength_px, patterns=("fibres", "fractal"), hsv=np.array([0.08, 0.35, 0.3])
    )
    thing = [Part(outline=shapes.branches(rng), material=bark)]
    if rng.random() < 0.65:
        leaf_hsv = np.array([rng.uniform(0.1, 0.35), rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.6)])
        leaves = random_material(
            rng, wavelength_px, patterns=("foliage", "spots", "speckle"), hsv=leaf_hsv
        )
        crown: Outline = []
        for _ in range(int(rng.integers(2, 5))):
            place = affine(
                (rng.uniform(-0.4, 0.4), rng.uniform(-0.7, -0.1)), rng.uniform(0.35, 0.6, 2)
            )
            crown += transform(shapes.ragged(rng), place)
        thing.append(Part(outline=crown, material=leaves))
    return thing


def furniture(rng: Generator, wavelength_px: float) -> Thing:
    """A table or chair: a top, thin legs with holes between, at times a back with slats."""
    wood = random_material(rng, wavelength_px, patterns=("fibres", "rings", "plain", "stripes"))
    seat, leg = rng.uniform(-0.3, 0.1), rng.uniform(0.04, 0.09)
    frame: Outline = []
    for x, foot in ((-0.75, 1.0), (0.75, 1.0), (-0.5, 0.8), (0.5, 0.8)):
        frame += tube(np.array([[x * 0.9, seat], [x, foot - leg]]), leg)
    top = box(-0.9, seat - 0.12, 0.9, seat + 0.12, slant=rng.uniform(-0.15, 0.15))
    cover = wood if rng.random() < 0.4 else random_material(rng, wavelength_px)
    thing = [Part(outline=frame, material=wood)]
    if rng.random() < 0.5:
        outer, inner = box(-0.8, -1, 0.8, seat)[0][0], box(-0.68, -0.85, 0.68, seat - 0.1)[0][0]
        slats = [box(x - 0.05, -0.95, x + 0.05, seat)[0] for x in (-0.35, 0.0, 0.35)]
        back = [[outer, inner], *slats] if rng.random() < 0.6 else [[outer]]
        thing.append(Part(outline=back, material=cover))
    return [*thing, Part(outline=top, material=cover)]


def sign(rng: Generator, wavelength_px: float) -> Thing:
    """A panel with letters, on a pole."""
    pole = random_material(rng, wavelength_px, patterns=SMOOTH, hsv=np.array([0.6, 0.05, 0.5]))
    panel = random_material(rng, wavelength_px, patterns=SMOOTH, contrast=0.2)
    ink = random_material(rng, wavelength_px, patterns=SMOOTH, contrast=0.2)
    face = transform(
        shapes.superellipse(rng) if rng.random() < 0.6 else shapes.polygon(rng),
        affine((0, -0.45), (0.7, 0.55), rng.normal(0, 0.1)),
    )
    thing = [
        Part(outline=tube(np.array([[0, -0.3], [0, 0.96]]), 0.05), material=pole, annotated=False),
        Part(outline=face, material=panel),
    ]
    for x in np.linspace(-0.35, 0.35, int(rng.integers(1, 4))):
        letter = transform(shapes.glyph(rng), affine((x, -0.45), (0.18, 0.22)))
        thing.append(Part(outline=letter, material=ink, annotated=False, inside=True))
    return thing


def bowl(rng: Generator, wavelength_px: float) -> Thing:
    """A dish seen from above at an angle, with pieces of food in it."""
    china = random_material(rng, wavelength_px, patterns=SMOOTH)
    inside = random_material(rng, wavelength_px)
    tilt = rng.uniform(0.5, 1)
    thing = [
        Part(outline=ellipse((0, 0), (1, tilt)), material=china, annotated=False),
        Part(outline=ellipse((0, 0), (0.85, 0.85 * tilt)), material=inside, annotated=False),
    ]
    food = random_material(rng, wavelength_px)
    for _ in range(int(rng.integers(2, 7))):
        place = affine(
            rng.uniform(-0.5, 0.5, 2) * [1, tilt], rng.uniform(0.15, 0.4, 2), rng.uniform(0, 6)
        )
        piece = shapes.COMPACT[rng.integers(len(shapes.COMPACT))](rng)
        food = food if rng.random() < 0.6 else random_material(rng, wavelength_px)
        thing.append(Part(outline=transform(piece, place), material=food))
    return thing


def building(rng: Generator, wavelength_px: float) -> Thing:
    """A facade with rows of windows and a roof."""
    wall = random_material(rng, wavelength_px, patterns=("tiles", "plain", "fractal", "gradient"))
    glass, slate = random_material(rng, wavelength_px), random_material(rng, wavelength_px)
    half = rng.uniform(0.5, 1)
    thing = [Part(outline=box(-half, -0.6, half, 1), material=wall, annotated=False)]
    peak = rng.uniform(-0.5, 0.5) * half
    roof = [[np.array([[peak, -1], [half * 1.1, -0.55], [-half * 1.1, -0.55]])]]
    thing.append(Part(outline=roof, material=slate))
    rows, columns = int(rng.integers(1, 4)), int(rng.integers(2, 5))
    w, h = half / columns * rng.uniform(0.4, 0.7), 0.7 / rows * rng.uniform(0.3, 0.4)
    for y in np.linspace(-0.35, 0.6, rows + 1)[:-1] if rows > 1 else (-0.1,):
        for x in (np.arange(columns) + 0.5) / columns * 2 * half - half:
            opening = box(x - w, y - h, x + w, y + h)
            thing.append(Part(outline=opening, material=glass, annotated=False))
    door = box(peak - 0.15 * half, 0.5, peak + 0.2 * half, 1)
    return [*thing, Part(outline=door, material=random_material(rng, wavelength_px))]


def flower(rng: Generator, wavelength_px: float) -> Thing:
    """Petals round a centre, on a stem with a leaf."""
    petal, centre, green = (random_material(rng, wavelength_px) for _ in range(3))
    stem = np.array([[0, -0.3], [rng.uniform(-0.2, 0.2), 0.4], [rng.uniform(-0.2, 0.2), 1]])
    leaf = transform(shapes.spindle(rng), affine((0.3, 0.4), (0.4, 0.35), rng.uniform(-0.8, 0.2)))
    count, long = int(rng.integers(5, 11)), rng.uniform(0.25, 0.33)
    petals: Outline = []
    for turn in np.arange(count) * 2 * np.pi / count + rng.uniform(0, 1):
        middle = (long * np.cos(turn), long * np.sin(turn) - 0.4)
        petals += ellipse(middle, (long, 2.2 * long / count**0.8), turn)
    return [
        Part(outline=tube(stem, 0.04) + leaf, material=green, annotated=False),
        Part(outline=petals, material=petal),
        Part(outline=ellipse((0, -0.4), (0.16, 0.16)), material=centre),
    ]


Builder = Callable[[Generator, float], Thing]
STANDING: tuple[Builder, ...] = (creature, person, vehicle, cycle, tree, furniture, sign, building)
LYING: tuple[Builder, ...] = (vessel, bowl, flower)


def random_thing(rng: Generator, wavelength_px: float) -> tuple[Thing, bool]:
    """Draws a thing; the second value says whether it stands upright on the ground."""
    kind = rng.random()
    if kind < 0.4:
        return simple(rng, wavelength_px), False
    family = STANDING if kind < 0.85 else LYING
    return family[rng.integers(len(family))](rng, wavelength_px), family is STANDING
