"""Masks, clicks and boxes drawn on images; pictures in, pictures out.

An image is an (H, W, 3) uint8 RGB array. Nothing is drawn in place.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from sam_train.structures import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Color = tuple[int, int, int]

BLUE: Color = (30, 144, 255)
GREEN: Color = (46, 204, 64)
RED: Color = (255, 65, 54)
YELLOW: Color = (255, 220, 0)
WHITE: Color = (255, 255, 255)
INK: Color = (34, 34, 34)


def distinct_colors(num_colors: int) -> list[Color]:
    """Colours that differ from their neighbours in the list: steps of the golden ratio in hue."""
    colors = []
    for i in range(num_colors):
        saturation, value = (0.85, 0.65)[i % 2], (1.0, 0.9, 0.8)[i % 3]
        red, green, blue = colorsys.hsv_to_rgb(0.58 + i * 0.618034, saturation, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def overlay_masks(
    image: np.ndarray,
    masks: np.ndarray,
    *,
    colors: Sequence[Color] | None = None,
    opacity: float = 0.45,
    outline_px: int = 1,
) -> np.ndarray:
    """Tints masks and draws their outlines, the largest first so that none hides a smaller one.

    Args:
        image: (H, W, 3) uint8.
        masks: (P, H, W) bool.
        colors: one a mask; by default distinct ones.
        opacity: of the tint; 0 leaves the outlines alone.
        outline_px: 0 leaves them out.
    """
    drawn = image.copy()
    colors = distinct_colors(len(masks)) if colors is None else colors
    for i in np.argsort([-int(mask.sum()) for mask in masks], kind="stable"):
        mask, color = masks[i], colors[i]
        tinted = drawn[mask] * (1 - opacity) + np.array(color) * opacity
        drawn[mask] = tinted.round().astype(np.uint8)
        if outline_px:
            contours, _ = cv2.findContours(
                mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
            )
            cv2.drawContours(drawn, contours, -1, color, outline_px)
    return drawn


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, *, color: Color = YELLOW, line_px: int = 2
) -> np.ndarray:
    """Draws (n, 4) xyxy boxes, edges in the image's frame, with a dark rim that shows on any ground."""
    drawn = image.copy()
    for x0, y0, x1, y1 in np.asarray(boxes, float).reshape(-1, 4).round().astype(int).tolist():
        for rim_color, width in ((INK, line_px + 2), (color, line_px)):
            cv2.rectangle(drawn, (x0, y0), (x1 - 1, y1 - 1), rim_color, width)
    return drawn


def draw_points(
    image: np.ndarray, coords: np.ndarray, labels: np.ndarray, *, radius_px: int = 6
) -> np.ndarray:
    """Draws clicks: a green disc with a plus for foreground, a red one with a minus for background.

    Args:
        image: (H, W, 3) uint8.
        coords: (n, 2) pixel indices.
        labels: (n,); other labels than these two are passed over.
        radius_px: of the discs.
    """
    drawn = image.copy()
    arm, line_px = max(radius_px // 2, 1), max(radius_px // 4, 1)
    for (x, y), label in zip(np.asarray(coords).round().astype(int).tolist(), labels, strict=True):
        if label not in (FOREGROUND, BACKGROUND):
            continue
        color = GREEN if label == FOREGROUND else RED
        cv2.circle(drawn, (x, y), radius_px + 1, WHITE, cv2.FILLED, cv2.LINE_AA)
        cv2.circle(drawn, (x, y), radius_px, color, cv2.FILLED, cv2.LINE_AA)
        if radius_px >= 4:
            cv2.line(drawn, (x - arm, y), (x + arm, y), WHITE, line_px)
            if label == FOREGROUND:
                cv2.line(drawn, (x, y - arm), (x, y + arm), WHITE, line_px)
    return drawn


def draw_prompts(
    image: np.ndarray, coords: np.ndarray, labels: np.ndarray, *, radius_px: int = 6
) -> np.ndarray:
    """Draws one object's prompt: its box, if it has one, and its clicks.

    Args:
        image: (H, W, 3) uint8.
        coords: (N, 2) as in `Prompts`, in the image's frame.
        labels: (N,) as in `Prompts`.
        radius_px: of the clicks.
    """
    labels = np.asarray(labels)
    corners = [coords[labels == corner] for corner in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)]
    boxes = np.concatenate(corners, axis=1)
    return draw_points(draw_boxes(image, boxes), coords, labels, radius_px=radius_px)


def resized(image: np.ndarray, scale: float) -> np.ndarray:
    """Scales an image, or a mask as bool (which stays one)."""
    height, width = image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    is_mask = image.dtype == bool
    how = cv2.INTER_NEAREST if is_mask else cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    out = cv2.resize(image.astype(np.uint8), size, interpolation=how)
    return out.astype(bool) if is_mask else out


def captioned(image: np.ndarray, text: str, *, strip_px: int = 22) -> np.ndarray:
    """Puts a white strip with a line of text above an image; text too long is made smaller."""
    strip = np.full((strip_px, image.shape[1], 3), 255, np.uint8)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, strip_px / 48
    text_px = cv2.getTextSize(text, font, scale, 1)[0][0]
    # Wider margins than the text is drawn at: older OpenCV understates its width by a few pixels.
    scale *= min(1.0, (image.shape[1] - 12) / max(text_px, 1))
    cv2.putText(strip, text, (4, round(strip_px * 0.7)), font, scale, INK, 1, cv2.LINE_AA)
    return np.concatenate([strip, image])


def tiled(images: Sequence[np.ndarray], columns: int, *, gap_px: int = 6) -> np.ndarray:
    """Lays images out in rows from left to right, on white; each column and row as large as need be."""
    if not images:
        raise ValueError("expected images to lay out, got none")
    rows = [list(images[i : i + columns]) for i in range(0, len(images), columns)]
    widths = [max(row[c].shape[1] for row in rows if c < len(row)) for c in range(len(rows[0]))]
    heights = [max(image.shape[0] for image in row) for row in rows]
    canvas_size = (
        sum(heights) + gap_px * (len(rows) + 1),
        sum(widths) + gap_px * (len(widths) + 1),
        3,
    )
    canvas = np.full(canvas_size, 255, np.uint8)
    y = gap_px
    for row, row_height in zip(rows, heights, strict=True):
        x = gap_px
        for image, column_width in zip(row, widths, strict=False):
            canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
            x += column_width + gap_px
        y += row_height + gap_px
    return canvas


class ClickStep(NamedTuple):
    """What one panel of `click_strip` shows.

    Attributes:
        coords: (N, 2) of the prompt so far, as in `Prompts`, in the image's frame.
        labels: (N,) likewise.
        mask: (H, W) bool, the answer.
        caption: a few words above it.
    """

    coords: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    caption: str


def click_strip(
    image: np.ndarray,
    gt_mask: np.ndarray,
    steps: Sequence[ClickStep],
    *,
    caption: str = "",
    panel_px: int = 240,
) -> np.ndarray:
    """An object and the answers about it in a row, close up: click by click.

    The first panel is the image with the true outline in yellow; each other one adds a prompt and, in
    blue, the answer to it.

    Args:
        image: (H, W, 3) uint8.
        gt_mask: (H, W) bool.
        steps: the panels after the first.
        caption: of the first panel.
        panel_px: side of the panels.
    """
    shown = np.concatenate([step.coords[step.labels >= 0] for step in steps] or [np.zeros((0, 2))])
    x0, y0, x1, y1 = window_round(gt_mask, shown)
    scale = panel_px / max(x1 - x0, y1 - y0)
    close_up = resized(image[y0:y1, x0:x1], scale)
    truth = resized(gt_mask[y0:y1, x0:x1], scale)[None]
    outline = partial(overlay_masks, masks=truth, colors=[YELLOW], opacity=0.0, outline_px=2)
    panels = [captioned(outline(close_up), caption)]
    for step in steps:
        answer = resized(step.mask[y0:y1, x0:x1], scale)[None]
        panel = outline(overlay_masks(close_up, answer, colors=[BLUE], opacity=0.55))
        coords = (step.coords + 0.5 - (x0, y0)) * scale - 0.5
        panel = draw_prompts(panel, coords, step.labels, radius_px=max(panel_px // 44, 4))
        panels.append(captioned(panel, step.caption))
    return tiled(panels, len(panels), gap_px=3)


def window_round(mask: np.ndarray, coords: np.ndarray) -> tuple[int, int, int, int]:
    """A square window, as far as the image allows, round a mask and points, with some margin: xyxy."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    x = np.concatenate([columns, coords[:, 0]]) if len(rows) + len(coords) else np.arange(width)
    y = np.concatenate([rows, coords[:, 1]]) if len(rows) + len(coords) else np.arange(height)
    side = max(np.ptp(x), np.ptp(y)) * 1.6 + 24
    left, top = (np.array([x.min() + x.max(), y.min() + y.max()]) + 1 - side) / 2
    left, top = max(0, min(left, width - side)), max(0, min(top, height - side))
    return int(left), int(top), min(width, int(left + side)), min(height, int(top + side))


def save_image(path: Path, image: np.ndarray) -> None:
    """Writes an image, in the format its suffix names; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def new_figure(rows: int, columns: int, *, panel_in: tuple[float, float]) -> tuple[Figure, Any]:
    """A matplotlib figure of plots, tied to no window or backend.

    Args:
        rows: of plots.
        columns: of plots.
        panel_in: (width, height) of one plot, inches.

    Returns:
        The figure, and its axes as an array (rows, columns).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel_in[0] * columns, panel_in[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for plot in axes.flat:
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(alpha=0.25)
        plot.set_axisbelow(True)
    return figure, axes


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure from `new_figure`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
