"""Large images: objects across seams come out whole, as if the image had been looked at at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sam_train.inference.candidates import Candidates, FilterReport
from sam_train.inference.mask_filters import Place
from sam_train.inference.tiles import Tiling, find_in_tiles
from sam_train.ops import run_edges


class Labels:
    """A generator whose masks are the labels of an image, cut as a tile cuts them."""

    crop_nms_thresh = 0.7
    max_mask_area_fraction = 0.95

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def find_in(self, pixels: np.ndarray, place: Place) -> tuple[Candidates, FilterReport]:
        self.shapes.append(pixels.shape)
        labels = [label for label in np.unique(pixels) if label]
        masks = torch.stack([torch.from_numpy(pixels[..., 0] == label) for label in labels])
        top, left = place.origin
        edges = run_edges.run_edges(masks, top=top, left=left, height=place.size[0])
        boxes = torch.tensor([run_edges.box(own, place.size[0]) for own in edges])
        boxes[:, 2:] -= 1
        scores = torch.full((len(edges),), 0.9)
        region = [left, top, left + place.region[1], top + place.region[0]]
        points = torch.zeros(len(edges), 2, dtype=torch.float64)
        crops = torch.tensor(region).expand(len(edges), 4)
        return Candidates(edges, boxes, scores, scores, points, crops), FilterReport()

    def mend(self, found: Candidates, size: tuple[int, int]) -> tuple[Candidates, FilterReport]:
        return found, FilterReport()


def find(pixels: np.ndarray, **settings: int) -> tuple[set[int], FilterReport, Labels]:
    """The labels that come out whole, and nothing else may."""
    generator: Any = Labels()
    found, report = find_in_tiles(generator, pixels, Tiling(**settings))
    labels = set()
    for edges in found.edges:
        x0, y0, x1, y1 = box = run_edges.box(edges, pixels.shape[0])
        mask, patch = run_edges.window(edges, box, pixels.shape[0]), pixels[y0:y1, x0:x1, 0]
        label = int(patch[mask][0])
        np.testing.assert_array_equal(mask, patch == label)
        assert run_edges.area(edges) == (pixels == label).sum()
        assert label not in labels, "no object comes twice"
        labels.add(label)
    return labels, report, generator


def test_objects_across_seams_are_put_together() -> None:
    pixels = np.zeros((700, 900, 1), np.uint8)
    pixels[40:60, 50:80] = 1  # within one tile
    pixels[100:180, 30:870] = 2  # through all columns of tiles
    pixels[250:600, 260:640] = 3  # round the corner of several
    pixels[650:700, 0:40] = 4  # at the image's own border
    pixels[620:640, 225:245] = 5  # within the overlap

    labels, report, generator = find(pixels, tile_px=300, overlap_px=100)

    assert labels == set(range(1, 6))
    assert report.merged_tiles > 3 and report.kept == 5
    assert max(max(shape) for shape in generator.shapes) <= 300


def test_a_part_without_its_counterpart_is_dropped_and_counted() -> None:
    pixels = np.zeros((300, 500, 1), np.uint8)
    pixels[100:150, 150:260] = 1
    pixels[200:210, 20:40] = 2
    unseen = pixels.copy()

    class Blind(Labels):
        def find_in(self, pixels: np.ndarray, place: Place) -> tuple[Candidates, FilterReport]:
            if place.origin == (0, 0):
                return super().find_in(pixels, place)
            return Candidates.none(), FilterReport()

    generator: Any = Blind()
    found, report = find_in_tiles(generator, unseen, Tiling(tile_px=300, overlap_px=100))
    assert report.cut_by_tile == 0 and len(found.edges) == 2

    unseen[100:150, 150:400] = 1
    found, report = find_in_tiles(generator, unseen, Tiling(tile_px=300, overlap_px=100))
    assert (report.cut_by_tile, len(found.edges)) == (1, 1)


def test_an_image_of_6000_px_is_seen_in_tiles_only() -> None:
    pixels = np.zeros((4000, 6000, 1), np.uint8)
    draw = np.random.default_rng(0)
    for label in range(1, 41):
        y, x = (
            (label - 1) // 8 * 800 + draw.integers(300),
            (label - 1) % 8 * 750 + draw.integers(200),
        )
        pixels[y : y + draw.integers(50, 480), x : x + draw.integers(50, 500)] = label

    labels, report, generator = find(pixels, tile_px=1400, overlap_px=200)

    assert labels == set(range(1, 41)) and report.merged_tiles
    assert max(max(shape) for shape in generator.shapes) <= 1400


def test_a_background_of_many_tiles_is_too_large_for_one() -> None:
    labels, report, _ = find(np.ones((400, 700, 1), np.uint8), tile_px=300, overlap_px=100)

    assert not labels and report.too_large == 1


@pytest.mark.parametrize(("tile_px", "overlap_px"), [(1000, 30), (1000, 600)])
def test_overlaps_that_cannot_work_are_refused(tile_px: int, overlap_px: int) -> None:
    with pytest.raises(ValueError, match="tiles overlap by more than 40 pixels"):
        Tiling(tile_px=tile_px, overlap_px=overlap_px)
