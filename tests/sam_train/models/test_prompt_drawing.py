"""Prompts drawn on the mask grid: where they lie, how far they reach, and what reads them."""

import numpy as np
import pytest
import torch

from sam_train.checkpoints.build import build_model, model_config
from sam_train.models.prompt_drawing import PromptDrawing, draw_prompts
from sam_train.structures import Prompts

GRID, PIXELS, RADIUS = (16, 24), (64, 96), 4.0


def test_a_click_is_a_gaussian_spot_on_its_pixels_centre():
    coords = torch.tensor([[[30.0, 10.0], [77.0, 50.0], [0.0, 0.0]]])
    foreground, background, boxes = draw_prompts(
        coords, torch.tensor([[1, 0, -1]]), GRID, PIXELS, RADIUS
    )[0].unbind(-1)

    y, x = np.mgrid[: GRID[0], : GRID[1]] * 4.0 + 2.0  # centres of the cells, in pixels
    for drawn, (cx, cy) in ((foreground, (30.5, 10.5)), (background, (77.5, 50.5))):
        spot = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * RADIUS**2))
        np.testing.assert_allclose(drawn.numpy(), spot, atol=1e-6)
    assert not boxes.any()


def test_a_box_is_filled_to_its_edges():
    coords = torch.tensor([[[8.0, 12.0], [40.0, 52.0], [60.0, 60.0]]])
    drawn = draw_prompts(coords, torch.tensor([[2, 3, 1]]), GRID, PIXELS, RADIUS)[0, ..., 2]
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[3:13, 2:10] = True
    assert torch.equal(drawn > 0.5, inside)
    # A click and its padding are no corners of a box, in whatever order they come.
    shuffled = draw_prompts(coords, torch.tensor([[3, 2, 1]]), GRID, PIXELS, RADIUS)[0, ..., 2]
    assert not shuffled.any()


def test_several_clicks_add_up_to_no_more_than_one_and_none_draw_nothing():
    coords = torch.full((1, 5, 2), 30.0)
    drawn = draw_prompts(coords, torch.ones(1, 5, dtype=torch.long), GRID, PIXELS, RADIUS)
    assert drawn.max() == 1.0
    for num_points in (0, 1):
        labels = torch.full((2, num_points), -1)
        nothing = draw_prompts(torch.zeros(2, num_points, 2), labels, GRID, PIXELS, RADIUS)
        assert nothing.shape == (2, *GRID, 3)
        assert not nothing.any()


def test_the_drawing_tells_the_dense_embedding_where_the_click_is():
    torch.manual_seed(0)
    model = build_model(model_config("sam_tiny"))
    label = torch.ones(1, 1, dtype=torch.long)

    def dense(x: float) -> torch.Tensor:
        return model.prompt_encoder.embed(Prompts(torch.tensor([[[x, 100.0]]]), label))[1]

    with torch.no_grad():
        moved = (dense(50.0) - dense(200.0)).abs().sum(dim=(0, 1))
    rows, columns = (moved > 0.05 * moved.max()).nonzero().unbind(1)
    assert set(rows.tolist()) <= set(range(10, 16))
    assert {50 // 8, 200 // 8} <= set(columns.tolist()) <= {*range(3, 10), *range(22, 29)}


def test_both_calls_of_the_prompt_encoder_draw_the_same():
    torch.manual_seed(0)
    encoder = build_model(model_config("sam_tiny")).prompt_encoder
    coords, labels = torch.tensor([[[50.0, 60.0]]]), torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        _, published_call = encoder(points=(coords, labels))
        padding = torch.zeros(1, 1, 2)
        _, ours = encoder.embed(
            Prompts(torch.cat([coords, padding], 1), torch.tensor([[1, -1]]), None)
        )
    assert torch.equal(published_call, ours)


def test_a_radius_of_nothing_is_refused():
    with pytest.raises(ValueError, match="click_radius_px is above 0, got 0"):
        PromptDrawing(embed_dim=8, click_radius_px=0)
