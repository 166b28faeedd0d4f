import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from sam_train.prompts.draws import PromptDraws
from sam_train.prompts.points import center_click, uniform_click


def uniform_numbers(n: int, seed: int = 0) -> torch.Tensor:
    return PromptDraws.from_seeds([seed], [n]).for_pass(0).uniform(1)[:, 0]


def square(size=16, start=4, stop=12) -> torch.Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, start:stop, start:stop] = True
    return mask


def at(masks: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
    x, y = coords.long().unbind(-1)
    return masks[torch.arange(len(masks)), y, x]


def random_blobs(n: int, seed: int, size=(40, 32)) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((n, *size)), (0, 3, 3))
    return torch.from_numpy(noise > 0.02)


class ReferenceClicker:
    """RITM's rule, written out over whole images with scipy, one object at a time."""

    def __init__(self, gt: np.ndarray):
        self.gt = gt
        self.not_clicked = np.ones_like(gt)

    def next_click(self, pred: np.ndarray) -> tuple[int, int, int]:
        missed, surplus = self.gt & ~pred, ~self.gt & pred
        missed_depth = ndimage.distance_transform_edt(np.pad(missed, 1))[1:-1, 1:-1]
        surplus_depth = ndimage.distance_transform_edt(np.pad(surplus, 1))[1:-1, 1:-1]
        missed_depth, surplus_depth = (
            missed_depth * self.not_clicked,
            surplus_depth * self.not_clicked,
        )
        positive = missed_depth.max() > surplus_depth.max()
        depth = missed_depth if positive else surplus_depth
        y, x = (int(place[0]) for place in np.where(depth == depth.max()))
        self.not_clicked[y, x] = False
        return x, y, int(positive)


@pytest.mark.parametrize("click", ["uniform", "center"])
@pytest.mark.parametrize(("missed", "label"), [(True, 1), (False, 0)])
def test_a_click_lands_on_the_error_with_the_label_that_mends_it(click, missed, label):
    whole, half = square(), square()
    half[..., 8:] = False
    gt, pred = (whole, half) if missed else (half, whole)
    n = 50
    gt, pred = gt.expand(n, -1, -1), pred.expand(n, -1, -1)

    coords, labels = (
        uniform_click(gt, pred, uniform_numbers(n))
        if click == "uniform"
        else center_click(gt, pred)
    )

    assert at(gt ^ pred, coords).all()
    assert labels.tolist() == [label] * n


def test_uniform_clicks_are_uniform_over_the_error_and_labelled_by_the_truth():
    gt, pred = random_blobs(1, seed=1, size=(9, 11)), random_blobs(1, seed=2, size=(9, 11))
    n = 30_000
    coords, labels = uniform_click(
        gt.expand(n, -1, -1), pred.expand(n, -1, -1), uniform_numbers(n, seed=3)
    )

    error = (gt ^ pred)[0]
    flat = (coords[:, 1] * 11 + coords[:, 0]).long()
    counts = torch.bincount(flat, minlength=99)
    assert counts[~error.flatten()].sum() == 0
    assert error.sum() > 20
    assert stats.chisquare(counts[error.flatten()].numpy()).pvalue > 0.01
    assert torch.equal(labels, gt[0].flatten()[flat].long())


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_every_rank_of_the_error_can_be_reached_and_none_beyond(uniform):
    gt = torch.zeros(1, 4, 5, dtype=torch.bool)
    gt[0, 1, 1] = gt[0, 1, 4] = gt[0, 3, 2] = True

    coords, labels = uniform_click(gt, None, torch.tensor([uniform], dtype=torch.float64))

    assert coords.tolist() == [{0.0: [1.0, 1.0], 0.5: [4.0, 1.0]}.get(uniform, [2.0, 3.0])]
    assert labels.tolist() == [1]


def test_a_uniform_click_does_not_depend_on_the_other_objects():
    gt, pred = random_blobs(12, seed=4), random_blobs(12, seed=5)
    numbers = uniform_numbers(12)
    together = uniform_click(gt, pred, numbers)

    for i in range(12):
        alone = uniform_click(gt[i : i + 1], pred[i : i + 1], numbers[i : i + 1])
        assert torch.equal(alone.coords[0], together.coords[i])
        assert alone.labels[0] == together.labels[i]


@pytest.mark.parametrize("kind", ["one_pixel", "whole", "corner"])
def test_a_first_click_is_in_the_object_however_it_lies(kind):
    gt = torch.zeros(1, 7, 9, dtype=torch.bool)
    if kind == "one_pixel":
        gt[0, 3, 5] = True
    elif kind == "whole":
        gt[:] = True
    else:
        gt[0, 6, 8] = True
    for coords, labels in (uniform_click(gt, None, uniform_numbers(1)), center_click(gt, None)):
        assert at(gt, coords).all()
        assert labels.tolist() == [1]
    if kind == "whole":
        assert center_click(gt, None).coords.tolist() == [[3.0, 3.0]]


def test_an_empty_object_gets_a_background_click_anywhere():
    gt = torch.zeros(500, 6, 8, dtype=torch.bool)
    coords, labels = uniform_click(gt, None, uniform_numbers(500))

    assert labels.unique().tolist() == [0]
    assert len(coords.unique(dim=0)) == 48
    assert center_click(gt[:1], gt[:1]).labels.tolist() == [0]


def test_an_empty_object_is_mended_where_something_was_predicted():
    gt = torch.zeros(1, 16, 16, dtype=torch.bool)
    for coords, labels in (
        uniform_click(gt, square(), uniform_numbers(1)),
        center_click(gt, square()),
    ):
        assert at(square(), coords).all()
        assert labels.tolist() == [0]


def test_a_perfect_mask_is_confirmed_by_a_click_in_the_object():
    gt = random_blobs(40, seed=6)
    for coords, labels in (
        uniform_click(gt, gt, uniform_numbers(40)),
        center_click(gt, gt),
    ):
        assert at(gt, coords).all()
        assert labels.unique().tolist() == [1]
    assert torch.equal(center_click(gt, gt).coords, center_click(gt, None).coords)


def test_a_perfect_one_pixel_mask_is_clicked_again_where_there_is_no_other_pixel():
    gt = torch.zeros(1, 5, 5, dtype=torch.bool)
    gt[0, 2, 3] = True
    clicked = torch.tensor([[[3.0, 2.0]]])
    for coords, labels in (
        uniform_click(gt, gt, uniform_numbers(1), clicked),
        center_click(gt, gt, clicked),
    ):
        assert coords.tolist() == [[3.0, 2.0]]
        assert labels.tolist() == [1]


def test_uniform_clicks_leave_out_excluded_pixels_and_only_those():
    gt = torch.zeros(1, 6, 6, dtype=torch.bool)
    gt[0, :2, :3] = True
    excluded = torch.tensor([[[0.0, 0.0], [2.0, 1.0], [-1.0, -1.0], [5.0, 5.0]]])
    n = 400
    coords, _ = uniform_click(
        gt.expand(n, -1, -1), None, uniform_numbers(n), excluded.expand(n, -1, -1)
    )

    assert sorted(coords.unique(dim=0).tolist()) == [[0, 1], [1, 0], [1, 1], [2, 0]]


def test_points_that_are_none_exclude_nothing():
    gt = torch.zeros(1, 3, 3, dtype=torch.bool)
    gt[0, 0, 0] = True
    none = torch.full((1, 2, 2), -1.0)

    assert uniform_click(gt, None, uniform_numbers(1), none).coords.tolist() == [[0.0, 0.0]]
    assert gt.sum() == 1


@pytest.mark.parametrize("seed", range(6))
def test_center_clicks_are_those_of_ritms_rule(seed):
    gt = random_blobs(8, seed=10 + seed)
    clickers = [ReferenceClicker(mask.numpy()) for mask in gt]
    clicked = torch.zeros(8, 0, 2)
    pred = torch.zeros_like(gt)
    for round_ in range(6):
        expected = [c.next_click(p.numpy()) for c, p in zip(clickers, pred, strict=True)]
        coords, labels = center_click(gt, pred if round_ else None, clicked)
        assert torch.cat([coords.long(), labels[:, None]], dim=1).tolist() == [
            list(click) for click in expected
        ]
        clicked = torch.cat([clicked, coords[:, None]], dim=1)
        pred = random_blobs(8, seed=100 * seed + round_)


def test_a_click_stays_excluded_while_its_error_does():
    gt, nothing = square(), torch.zeros_like(square())
    first = center_click(gt, nothing).coords
    again = center_click(gt, nothing, first[:, None]).coords

    assert first.tolist() == [[7.0, 7.0]]
    assert again.tolist() == [[8.0, 7.0]]


def test_equal_errors_are_mended_from_the_background():
    gt, pred = torch.zeros(2, 1, 9, 20, dtype=torch.bool)
    gt[0, 2:7, 2:7] = True
    pred[0, 2:7, 12:17] = True

    click = center_click(gt, pred)

    assert click.coords.tolist() == [[14.0, 4.0]]
    assert click.labels.tolist() == [0]


def test_beyond_the_image_is_not_the_object():
    gt = torch.zeros(1, 11, 11, dtype=torch.bool)
    gt[0, :, :5] = True

    assert center_click(gt, None).coords.tolist() == [[2.0, 2.0]]


def test_a_center_click_is_the_same_every_time():
    gt, pred = random_blobs(60, seed=7, size=(70, 66)), random_blobs(60, seed=8, size=(70, 66))
    first = center_click(gt, pred)

    assert all(torch.equal(center_click(gt, pred).coords, first.coords) for _ in range(5))
