"""Masks on a picture with matplotlib, as the published notebooks show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from sam_train.ops import rle
from sam_train.structures import FOREGROUND

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPACITY = 0.55
BORDER_PX = 2


def show_masks(
    image: np.ndarray,
    masks: Any,
    scores: np.ndarray | None = None,
    *,
    point_coords: np.ndarray | None = None,
    point_labels: np.ndarray | None = None,
    box: np.ndarray | None = None,
    borders: bool = True,
    seed: int | None = None,
    ax: Axes | None = None,
) -> list[Axes]:
    """Draws masks over an image, the largest first so that none hides a smaller one.

    Args:
        image: (H, W, 3) or (H, W), as matplotlib shows it.
        masks: what a predictor returns: (N, H, W) or (N, 1, H, W) bool, array or tensor; of several
            candidates for many prompts, (N, M, H, W), all are drawn. Or the list of dicts of an automatic
            mask generator, with RLEs or arrays.
        scores: (N,) of masks (N, H, W): each mask then gets a picture of its own under its score, as
            the candidates for one prompt are compared. Else (N, M), written onto the masks.
        point_coords: (n, 2) clicks to draw.
        point_labels: (n,) of them, 1 for the object.
        box: (4,) or (n, 4) xyxy to draw.
        borders: outline the masks.
        seed: of the colours; None draws new ones every time.
        ax: where to draw; by default in a new figure.

    Returns:
        The axes drawn in; the figure is their `.figure`.

    Raises:
        ValueError: masks have another shape than the image, or scores than the masks.
    """
    from matplotlib import pyplot as plt

    image = np.asarray(image)
    flat, is_flat = _stacked(masks, image.shape[:2])
    values = None if scores is None else np.asarray(_on_cpu(scores), float).reshape(-1)
    if values is not None and len(values) != len(flat):
        raise ValueError(f"expected a score for each of {len(flat)} masks, got {len(values)}")
    rng = np.random.default_rng(seed)
    colors = rng.random((len(flat), 3))
    apart = values is not None and is_flat and ax is None
    if ax is None:
        columns = max(1, len(flat)) if apart else 1
        figure = plt.figure(figsize=(min(8 * columns, 24), 8), layout="constrained")
        panels = list(figure.subplots(1, columns, squeeze=False)[0])
    else:
        panels = [ax]
    for number, panel in enumerate(panels):
        shown = [number] if apart and len(flat) else range(len(flat))
        panel.imshow(image, cmap="gray" if image.ndim == 2 else None)
        panel.imshow(_layer(flat[list(shown)], colors[list(shown)], borders))
        _show_prompts(panel, point_coords, point_labels, box)
        panel.axis("off")
        if apart and values is not None and len(flat):
            panel.set_title(f"Mask {number + 1}, score: {values[number]:.3f}", fontsize=18)
        elif values is not None:
            _write_scores(panel, flat, values)
    return panels


def _stacked(masks: Any, size: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """Masks as (N, H, W) bool, and whether they came with that shape."""
    if isinstance(masks, Sequence) and all(isinstance(mask, Mapping) for mask in masks):
        found = [_segmentation(mask["segmentation"]) for mask in masks]
        stacked = np.stack(found) if found else np.zeros((0, *size), bool)
    else:
        stacked = np.asarray(_on_cpu(masks))
    is_flat = stacked.ndim == 3
    if stacked.ndim not in (2, 3, 4) or stacked.shape[-2:] != tuple(size):
        raise ValueError(
            f"expected masks (N, H, W) or (N, 1, H, W) of the image's {size[0]} x {size[1]} pixels, got "
            f"shape {stacked.shape}"
        )
    return stacked.reshape(-1, *size).astype(bool), is_flat


def _segmentation(value: Any) -> np.ndarray:
    return rle.decode(value) if isinstance(value, Mapping) else np.asarray(value)


def _on_cpu(values: Any) -> Any:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values


def _layer(masks: np.ndarray, colors: np.ndarray, borders: bool) -> np.ndarray:
    """The masks as one (H, W, 4) picture, transparent where there is none."""
    layer = np.zeros((*masks.shape[1:], 4))
    for i in np.argsort([-int(mask.sum()) for mask in masks], kind="stable"):
        layer[masks[i]] = (*colors[i], OPACITY)
        if borders:
            found = cv2.findContours(
                masks[i].astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
            )[0]
            edge = cv2.drawContours(np.zeros(masks.shape[1:], np.uint8), found, -1, 1, BORDER_PX)
            layer[edge > 0] = (*(0.6 * colors[i] + 0.4), 0.9)
    return layer


def _show_prompts(
    panel: Axes, coords: np.ndarray | None, labels: np.ndarray | None, box: np.ndarray | None
) -> None:
    if coords is not None:
        coords = np.asarray(coords).reshape(-1, 2)
        is_object = (
            np.ones(len(coords), bool)
            if labels is None
            else np.asarray(labels).reshape(-1) == FOREGROUND
        )
        for chosen, color in ((is_object, "lime"), (~is_object, "red")):
            x, y = coords[chosen].T
            panel.scatter(x, y, s=300, color=color, marker="*", edgecolor="white", linewidth=1.2)
    if box is not None:
        for x0, y0, x1, y1 in np.asarray(box).reshape(-1, 4):
            panel.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="lime", linewidth=2)


def _write_scores(panel: Axes, masks: np.ndarray, scores: np.ndarray) -> None:
    for mask, score in zip(masks, scores, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            where = float(columns.mean()), float(rows.mean())
            panel.text(*where, f"{score:.2f}", color="white", ha="center", va="center", fontsize=9)
