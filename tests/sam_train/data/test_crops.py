import numpy as np
import pytest

from sam_train.data.crops import LargeScaleJitter, ObjectZoom, whole_image

SIZES = [(60, 90), (90, 60), (64, 64), (7, 200)]


def views(crop, size, boxes, count=200, img_size=64):
    rng = np.random.default_rng(0)
    return [crop(size, boxes, img_size, rng) for _ in range(count)]


def scales(view):
    x0, y0, x1, y1 = view.window
    return view.resized[1] / (x1 - x0), view.resized[0] / (y1 - y0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [whole_image, LargeScaleJitter(), ObjectZoom(prob=1)])
def test_windows_lie_in_the_image_and_fit_the_model_input(crop, size):
    box = np.array([[2.0, 1.0, 6.0, 5.0]])
    for view in views(crop, size, box):
        x0, y0, x1, y1 = view.window
        assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]
        assert min(view.resized) >= 1 and max(view.resized) <= 64


def test_the_whole_image_fills_the_model_input():
    (view,) = views(whole_image, (60, 90), np.zeros((1, 4)), 1)
    assert (view.window, view.resized) == ((0, 0, 90, 60), (43, 64))


def test_large_scale_jitter_spans_its_range_and_keeps_proportions():
    found = np.array([scales(view) for view in views(LargeScaleJitter(), (128, 128), None)])
    assert found.min() < 0.06 and found.max() > 0.95  # of 0.05 and 1.0: half the size, by 0.1 to 2
    np.testing.assert_allclose(found[:, 0], found[:, 1], rtol=0.05)


def test_jitter_above_one_crops_everywhere_and_below_one_never():
    large = views(LargeScaleJitter(scale=(2, 2)), (128, 128), None)
    assert all(view.resized == (64, 64) for view in large)
    assert min(view.window[0] for view in large) == 0 and max(v.window[2] for v in large) == 128
    small = views(LargeScaleJitter(scale=(0.5, 0.5)), (128, 128), None)
    assert {(view.window, view.resized) for view in small} == {((0, 0, 128, 128), (32, 32))}


def test_zoom_makes_the_object_large_enough_and_shows_all_of_it():
    boxes = np.array([[50.0, 20.0, 55.0, 24.0], [0.0, 0.0, 4.0, 4.0], [198.0, 296.0, 200.0, 300.0]])
    zoom = ObjectZoom(prob=1, object_share=(0.2, 0.5), max_scale=100)
    for view in views(zoom, (300, 200), boxes):
        x0, y0, x1, y1 = view.window
        shown = (
            (boxes[:, 0] >= x0) & (boxes[:, 2] <= x1) & (boxes[:, 1] >= y0) & (boxes[:, 3] <= y1)
        )
        share = np.max((boxes[:, 2:] - boxes[:, :2]) / (x1 - x0), axis=1)
        assert (shown & (share > 0.19) & (share < 0.55)).any()


def test_zoom_moves_the_object_about():
    box = np.array([[100.0, 100.0, 104.0, 104.0]])
    starts = {view.window[:2] for view in views(ObjectZoom(prob=1), (300, 300), box)}
    assert len(starts) > 100


def test_zoom_leaves_large_objects_whole_and_never_blurs_beyond_its_limit():
    whole = views(whole_image, (60, 90), None, 1)[0]
    large = np.array([[0.0, 0.0, 80.0, 50.0]])
    assert set(views(ObjectZoom(prob=1), (60, 90), large)) == {whole}
    tiny = np.array([[30.0, 30.0, 31.0, 31.0]])
    zoomed = views(ObjectZoom(prob=1, max_scale=3), (60, 90), tiny)
    assert max(max(scales(view)) for view in zoomed) <= 3.2


def test_zoom_happens_as_often_as_told():
    whole = views(whole_image, (60, 90), None, 1)[0]
    tiny = np.array([[30.0, 30.0, 31.0, 31.0]])
    zoomed = sum(view != whole for view in views(ObjectZoom(prob=0.25), (60, 90), tiny, 400))
    assert 70 <= zoomed <= 130


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (LargeScaleJitter, {"scale": (0, 1)}),
        (LargeScaleJitter, {"scale": (2, 1)}),
        (ObjectZoom, {"prob": 2}),
        (ObjectZoom, {"object_share": (0.5, 1.5)}),
    ],
)
def test_impossible_settings_are_refused(kind, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
        kind(**arguments)
