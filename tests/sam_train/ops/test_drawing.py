import numpy as np
import pytest
from PIL import Image

from sam_train.ops.drawing import (
    BLUE,
    GREEN,
    RED,
    YELLOW,
    ClickStep,
    captioned,
    click_strip,
    distinct_colors,
    draw_boxes,
    draw_points,
    draw_prompts,
    new_figure,
    overlay_masks,
    resized,
    save_figure,
    save_image,
    tiled,
)


def grey(height: int = 40, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


def square(y0: int, x0: int, side: int, shape: tuple[int, int] = (40, 60)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[y0 : y0 + side, x0 : x0 + side] = True
    return mask


def test_a_tint_covers_the_mask_and_nothing_else():
    image, mask = grey(), square(5, 5, 10)

    drawn = overlay_masks(image, mask[None], colors=[(200, 0, 100)], opacity=0.5, outline_px=0)

    assert (drawn[mask] == (150, 50, 100)).all()
    assert (drawn[~mask] == 100).all()
    assert (image == 100).all()


def test_a_small_mask_shows_on_a_large_one_in_any_order():
    masks = np.stack([square(12, 12, 4), square(5, 5, 25)])
    for order in ([0, 1], [1, 0]):
        colors = [[(255, 0, 0), (0, 0, 255)][i] for i in order]
        drawn = overlay_masks(grey(), masks[order], colors=colors, opacity=1.0)
        assert drawn[13, 13].tolist() == [255, 0, 0]
        assert drawn[20, 20].tolist() == [0, 0, 255]


def test_an_outline_follows_the_border_with_holes_and_leaves_the_inside_alone():
    mask = square(5, 5, 20)
    mask[12:18, 12:18] = False

    drawn = overlay_masks(grey(), mask[None], colors=[YELLOW], opacity=0.0)

    assert drawn[5, 10].tolist() == list(YELLOW)
    assert drawn[11, 14].tolist() == list(YELLOW)
    assert drawn[8, 8].tolist() == [100, 100, 100]


def test_points_show_their_label_and_padding_is_passed_over():
    coords = np.array([[10.0, 10.0], [40.0, 20.0], [20.0, 30.0]])

    drawn = draw_points(grey(), coords, np.array([1, 0, -1]), radius_px=5)

    assert drawn[13, 13].tolist() == list(GREEN)
    assert drawn[23, 43].tolist() == list(RED)
    assert (drawn[25:36, 14:27] == 100).all()


def test_a_prompt_shows_its_box_and_its_clicks():
    coords = np.array([[10.0, 5.0], [50.0, 35.0], [30.0, 20.0]])

    drawn = draw_prompts(grey(), coords, np.array([2, 3, 0]))
    box_only = draw_boxes(grey(), np.array([[10, 5, 50, 35]]))

    assert drawn[5, 30].tolist() == list(YELLOW)
    assert drawn[34, 30].tolist() == list(YELLOW)
    assert drawn[17, 30].tolist() == list(RED)
    assert (box_only[20, 30] == 100).all()


def test_colors_are_distinct():
    assert len(set(distinct_colors(40))) == 40


def test_scaling_keeps_masks_masks():
    assert resized(square(0, 0, 20), 0.5).dtype == bool
    assert resized(square(0, 0, 20), 2.0).sum() == 1600
    assert resized(grey(), 1.5).shape == (60, 90, 3)


def test_tiles_lie_in_rows_on_white():
    small, large = grey(10, 10), grey(20, 30)

    sheet = tiled([small, large, small], columns=2, gap_px=2)

    assert sheet.shape == (20 + 10 + 6, 10 + 30 + 6, 3)
    assert (sheet[2:12, 2:12] == 100).all()
    assert (sheet[2:22, 14:44] == 100).all()
    assert (sheet[24:34, 2:12] == 100).all()
    assert (sheet[24:34, 14:44] == 255).all()
    with pytest.raises(ValueError, match="got none"):
        tiled([], columns=2)


def test_a_caption_stands_above_the_image_and_fits():
    drawn = captioned(grey(), "a caption far too long for the image it stands above", strip_px=20)

    assert drawn.shape == (60, 60, 3)
    assert (drawn[20:] == 100).all()
    assert drawn[:20].min() < 200
    assert (drawn[:20, -3:] == 255).all()


def test_a_strip_has_a_panel_per_click_with_the_truth_and_the_answer():
    truth = square(10, 20, 12)
    step = ClickStep(np.array([[25.0, 15.0], [0.0, 0.0]]), np.array([1, -1]), ~truth, "1 click")

    strip = click_strip(grey(), truth, [step, step], caption="x", panel_px=120)

    colors = {tuple(color) for color in strip.reshape(-1, 3).tolist()}
    assert {YELLOW, BLUE, GREEN} <= colors
    assert 3 * 110 < strip.shape[1] < 3 * 130
    # The padding at (0, 0) does not widen the close-up: the truth fills much of the first panel.
    first = (strip[:, :120] == YELLOW).all(-1)
    assert np.ptp(np.nonzero(first)[1]) > 120 * 0.25


def test_a_strip_can_show_an_object_that_is_empty_or_the_whole_image():
    for truth in (np.zeros((40, 60), bool), np.ones((40, 60), bool)):
        step = ClickStep(np.zeros((2, 2)), np.array([-1, -1]), truth, "")
        assert click_strip(grey(), truth, [step], panel_px=60).ndim == 3


def test_pictures_are_written_with_their_folders(tmp_path):
    save_image(tmp_path / "a" / "b.png", grey())
    figure, axes = new_figure(1, 2, panel_in=(2, 1))
    axes[0, 1].plot([0, 1])
    save_figure(tmp_path / "c" / "d.png", figure)

    with (
        Image.open(tmp_path / "a" / "b.png") as image,
        Image.open(tmp_path / "c" / "d.png") as plot,
    ):
        assert image.size == (60, 40)
        assert plot.size == (520, 130)
