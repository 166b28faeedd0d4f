import pytest
import torch

from sam_train.prompts.boxes import gaussian_box_shifts, shift_boxes, uniform_box_shifts
from sam_train.prompts.draws import PromptDraws


def test_gaussian_noise_has_a_tenth_of_the_side_as_its_deviation_and_is_capped():
    n = 20_000
    boxes = torch.tensor([[100.0, 200.0, 150.0, 600.0]]).expand(n, 4)
    normal = PromptDraws.from_seeds([0], [n]).for_pass(0).normal(4)

    shifts = gaussian_box_shifts(boxes, normal, sigma=0.1, max_shift_px=20)

    assert shifts[:, 0::2].std() == pytest.approx(5, rel=0.03)  # of the width, 50 px
    assert shifts.mean(0).abs().max() < 0.5
    assert shifts.abs().max() == 20
    # 40 px of deviation meet a cap of 20: what lies within one half of a deviation is untouched.
    assert (shifts[:, 1].abs() < 20).float().mean() == pytest.approx(0.383, abs=0.02)


def test_uniform_shifts_go_in_and_out_alike_up_to_the_limit():
    n = 5000
    boxes = torch.tensor([[100.0, 200.0, 300.0, 600.0]]).expand(n, 4)
    uniform = PromptDraws.from_seeds([0], [n]).for_pass(0).uniform(4)

    shifts = uniform_box_shifts(boxes, uniform, max_shift_px=20)

    assert shifts.abs().max() <= 20
    assert shifts.amin(0).max() < -19.5
    assert shifts.amax(0).min() > 19.5
    assert shifts.mean(0).abs().max() < 0.7
    outward = shifts * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    assert torch.allclose(outward.double(), (2 * uniform - 1) * 20, atol=1e-4)


def test_uniform_shifts_never_turn_a_small_box_inside_out():
    boxes = torch.tensor([[50.0, 50.0, 54.0, 58.0]])
    inwards = torch.zeros(1, 4)

    moved = shift_boxes(boxes, uniform_box_shifts(boxes, inwards, max_shift_px=20), (100, 100))

    assert moved.tolist() == [[51.0, 52.0, 53.0, 56.0]]


def test_moved_boxes_stay_on_the_grid_and_keep_their_orientation():
    boxes = torch.tensor([[0.0, 0.0, 30.0, 20.0], [10.0, 5.0, 12.0, 6.0], [3.0, 3.0, 3.0, 3.0]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        shifts = torch.randn(3, 4, generator=generator) * 15
        x0, y0, x1, y1 = shift_boxes(boxes, shifts, (20, 30)).unbind(1)
        assert ((x0 >= 0) & (x0 <= x1) & (x1 <= 30)).all()
        assert ((y0 >= 0) & (y0 <= y1) & (y1 <= 20)).all()
