import itertools

import numpy as np
import pytest
import torch

from sam_train.ops import coords
from sam_train.ops.coords import View

ResizeLongestSide = pytest.importorskip("segment_anything.utils.transforms").ResizeLongestSide


@pytest.mark.parametrize("size", [(480, 640), (333, 1000), (7, 1), (1, 3000), (256, 256)])
def test_points_and_boxes_move_as_in_segment_anything(size):
    published = ResizeLongestSide(256)
    points = np.random.default_rng(0).uniform(0, 1, (5, 2)) * size[::-1]
    boxes = np.random.default_rng(1).uniform(0, 1, (5, 4)) * (size[::-1] * 2)

    input_size = coords.preprocess_shape(*size, 256)

    if min(size) > 1:  # the published function rounds the shorter side to no pixel at all
        assert input_size == published.get_preprocess_shape(*size, 256)
        for mine, theirs in (
            (coords.to_input_frame(points, size, input_size), published.apply_coords(points, size)),
            (coords.to_input_frame(boxes, size, input_size), published.apply_boxes(boxes, size)),
        ):
            np.testing.assert_allclose(mine, theirs)
    assert min(input_size) >= 1 and max(input_size) == 256


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_frames_come_back(kind):
    points = kind([[[3.25, 4.0], [0.0, 7.5]]])
    moved = coords.to_input_frame(points, (30, 40), (192, 256))

    assert moved.tolist() == [[[20.8, 25.6], [0.0, 48.0]]] or np.allclose(
        moved, [[[20.8, 25.6], [0.0, 48.0]]]
    )
    assert np.allclose(coords.to_original_frame(moved, (30, 40), (192, 256)), points)
    assert np.allclose(coords.input_to_grid(coords.grid_to_input(points, 4), 4), points)
    assert np.allclose(coords.boxes_to_input(coords.boxes_to_grid(points, 4), 4), points)


def test_whole_numbers_are_not_rounded_when_they_move():
    assert coords.to_input_frame(torch.tensor([[1, 1]]), (3, 3), (4, 4)).tolist() == [
        pytest.approx([4 / 3, 4 / 3])
    ]


def test_the_centre_of_a_grid_cell_lies_between_the_pixels_it_covers():
    first_cell = coords.grid_to_input(torch.tensor([[0.0, 0.0]]), 4)
    assert first_cell.tolist() == [[1.5, 1.5]]  # of pixels 0 to 3


def test_coordinates_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="points"):
        coords.to_input_frame(torch.zeros(2, 3), (4, 4), (8, 8))


@pytest.mark.parametrize("flips", list(itertools.product([False, True], repeat=3)))
def test_a_view_moves_boxes_pixels_and_grid_lines_alike(flips):
    size, stride = (12, 20), 2
    flip_x, flip_y, transpose = flips
    view = View(
        window=(2, 1, 18, 9), resized=(16, 32), flip_x=flip_x, flip_y=flip_y, transpose=transpose
    )
    pixels = np.zeros(size, bool)
    pixels[3:5, 6:11] = True
    box = np.array([[6.0, 3.0, 11.0, 5.0]])

    shown = view.orient(pixels[1:9, 2:18].repeat(2, axis=0).repeat(2, axis=1))
    (moved,) = view.boxes_to_input(box)

    assert shown.shape == view.input_size
    y, x = np.nonzero(shown)
    assert moved.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]

    x_lines, y_lines = view.grid_edges(stride, 18)
    on_grid = np.zeros((18, 18), bool)
    inside_x = (x_lines[:-1] >= 6) & (x_lines[1:] <= 11)
    inside_y = (y_lines[:-1] >= 3) & (y_lines[1:] <= 5)
    on_grid[np.ix_(inside_y, inside_x)] = True
    height, width = shown.shape[0] // stride, shown.shape[1] // stride
    np.testing.assert_array_equal(view.orient(on_grid)[:height, :width], shown[::stride, ::stride])


def test_cells_that_begin_in_the_padding_are_outside() -> None:
    inside = coords.cells_inside(torch.tensor([[8, 8], [3, 5]]), 4, 2.0)

    assert inside[0].all()
    assert inside[1].any(dim=1).tolist() == [True, True, False, False]
    assert inside[1].any(dim=0).tolist() == [True, True, True, False]
