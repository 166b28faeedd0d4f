"""The pictures of a round's report: whole images with their masks, and masks close up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data_engine.examples import Example, Examples
from data_engine.mask_sample import SampledImage
from data_engine.report_content import Report
from data_engine.report_page import Drawn, counted, titled
from sam_train.inference.overlays import draw_annotations
from sam_train.ops import drawing, rle
from sam_train.ops.files import write_atomically
from sam_train.structures import Annotation

log = logging.getLogger(__name__)

Pixels = Callable[[], np.ndarray]
"""Gives an image's (H, W, 3) uint8 RGB pixels; OSError where they are gone."""
COLUMNS = 3
IMAGE_PX, CLOSE_UP_PX = 300, 220
GREY_LEVEL = 225
MAX_KEY = 24
"""Characters of an image's name that are shown."""
LEGEND = "Red: the mask that was looked at. Green: what it became."


def draw(
    folder: Path,
    report: Report,
    images: Sequence[SampledImage],
    examples: Examples,
    pixels: Mapping[str, Pixels],
) -> list[Drawn]:
    """Draws the sheets for which there are pictures into a folder.

    Args:
        folder: gets them.
        report: of the round.
        images: shown whole.
        examples: masks, shown close up.
        pixels: of the images of the examples, by id.
    """
    is_audited, reader = report.audit is not None, _Reader()
    whole = [_whole(own, reader) for own in images]
    sheets = [("images", "random images with all masks", "", whole)]
    for name, chosen, which in (
        ("random", examples.random, "random masks"),
        ("best", examples.best, f"best masks by {examples.measure}"),
        ("worst", examples.worst, f"worst masks by {examples.measure}"),
    ):
        close_ups = [_close_up(own, pixels.get(own.image_id), reader, is_audited) for own in chosen]
        sheets.append((name, which, LEGEND if is_audited else "", close_ups))
    simulated = report.is_audit_simulated if is_audited else report.now.is_simulated
    drawn = [
        _sheet(folder, *sheet, report.now.is_simulated if sheet[0] == "images" else simulated)
        for sheet in sheets
    ]
    return [own for own in drawn if own is not None]


def _sheet(
    folder: Path,
    name: str,
    title: str,
    caption: str,
    pictures: Sequence[np.ndarray | None],
    is_simulated: bool,
) -> Drawn | None:
    if not pictures:
        return None
    shown = [_gone() if own is None else own for own in pictures]
    sheet = drawing.tiled(shown, min(COLUMNS, len(shown)))
    title = titled(title, is_simulated)
    picture = drawing.captioned(sheet, title, strip_px=26)
    file = f"{name}.png"
    write_atomically(folder / file, lambda path: Image.fromarray(picture).save(path, "PNG"))
    if gone := sum(own is None for own in pictures):
        caption = (
            f"{caption} {counted(gone, 'picture')} cannot be shown: the image is gone.".strip()
        )
    return Drawn(
        "pictures", file, title, f"{title[0].upper()}{title[1:]}. {caption}".strip(), is_wide=True
    )


def _gone() -> np.ndarray:
    """Stands where a picture cannot be shown."""
    return drawing.captioned(
        np.full((CLOSE_UP_PX, CLOSE_UP_PX, 3), GREY_LEVEL, np.uint8), "the image is gone"
    )


class _Reader:
    """Reads images; one that is gone is said once, and not looked for again."""

    def __init__(self) -> None:
        self.gone: set[str] = set()

    def read(self, name: str, pixels: Pixels | None) -> np.ndarray | None:
        if pixels is None or name in self.gone:
            return None
        try:
            return pixels()
        except (OSError, ValueError) as error:
            log.warning("%s is not shown: %s", name, error)
            self.gone.add(name)
            return None


def _whole(own: SampledImage, reader: _Reader) -> np.ndarray | None:
    if (image := reader.read(own.image_id, own.pixels)) is None:
        return None
    annotations = [
        Annotation(id=number, rle=mask.rle, bbox=rle.bbox(mask.rle), area=mask.area)
        for number, mask in enumerate(own.masks)
    ]
    drawn = draw_annotations(image, annotations, longest_px=IMAGE_PX)
    return drawing.captioned(
        _widened(drawn, IMAGE_PX), f"{_short(own.key)}: {counted(len(own.masks), 'mask')}"
    )


def _short(key: str) -> str:
    """A name that the pictures' font has letters for."""
    shown = key if len(key) <= MAX_KEY else f"{key[: MAX_KEY - 3]}..."
    return shown.encode("ascii", "replace").decode("ascii")


def _close_up(
    own: Example, pixels: Pixels | None, reader: _Reader, is_audited: bool
) -> np.ndarray | None:
    if (image := reader.read(own.image_id, pixels)) is None:
        return None
    masks = [rle.decode(one) for one in (own.rle, own.after) if one is not None]
    x0, y0, x1, y1 = drawing.window_round(np.logical_or.reduce(masks), np.zeros((0, 2)))
    scale = CLOSE_UP_PX / max(x1 - x0, y1 - y0)
    shown = drawing.resized(image[y0:y1, x0:x1], scale)
    cut = np.stack([drawing.resized(mask[y0:y1, x0:x1], scale) for mask in masks])
    if is_audited:
        colors = [drawing.RED, drawing.GREEN][: len(masks)]
        drawn = drawing.overlay_masks(shown, cut, colors=colors, opacity=0.0, outline_px=2)
    else:
        drawn = drawing.overlay_masks(shown, cut, colors=[drawing.BLUE], opacity=0.3, outline_px=2)
    return drawing.captioned(_padded(drawn, CLOSE_UP_PX), own.caption)


def _widened(image: np.ndarray, width_px: int) -> np.ndarray:
    """With white on its right, so that what is said of it has room above it."""
    more = max(0, width_px - image.shape[1])
    return cv2.copyMakeBorder(image, 0, 0, 0, more, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def _padded(image: np.ndarray, side_px: int) -> np.ndarray:
    """In the middle of a white square."""
    height, width = image.shape[:2]
    top, left = (side_px - height) // 2, (side_px - width) // 2
    return cv2.copyMakeBorder(
        image, top, side_px - height - top, left, side_px - width - left,
        cv2.BORDER_CONSTANT, value=(255, 255, 255),
    )  # fmt: skip
