"""Clicks and boxes as pictures: where the annotator pointed, said in the image's own grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sam_train.models.common import Downscaling
from sam_train.structures import BACKGROUND, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND

NUM_MAPS = 3


class PromptDrawing(nn.Module):
    """Draws prompts on the mask grid and reads the drawing as a mask prompt is read.

    The published decoder hears of clicks and boxes from tokens alone, and has to learn from position
    codes where they lie and what is inside a box. A drawing shows it; a small model then learns from
    few images (disks: Sofiiuk et al. 2021, RITM; boxes and clicks as dense maps: Liu et al. 2024,
    SegNext).

    Args:
        embed_dim: C.
        inner_chans: width of the inner layers.
        click_radius_px: standard deviation of a click's spot, pixels of the model input.
    """

    def __init__(
        self, *, embed_dim: int, inner_chans: int = 16, click_radius_px: float = 4.0
    ) -> None:
        super().__init__()
        if click_radius_px <= 0:
            raise ValueError(f"click_radius_px is above 0, got {click_radius_px}")
        self.click_radius_px = click_radius_px
        self.downscaling = Downscaling(NUM_MAPS, inner_chans, embed_dim)

    def forward(
        self, coords: Tensor, labels: Tensor, grid: tuple[int, int], pixels: tuple[int, int]
    ) -> Tensor:
        """Draws and reads.

        Args:
            coords: (P, N, 2) of `Prompts`, model input frame.
            labels: (P, N).
            grid: (h, w) of the mask grid.
            pixels: (H, W) of the model input.

        Returns:
            (P, C, h / 4, w / 4).
        """
        maps = draw_prompts(coords, labels, grid, pixels, self.click_radius_px)
        return self.downscaling(maps.permute(0, 3, 1, 2))


def draw_prompts(
    coords: Tensor, labels: Tensor, grid: tuple[int, int], pixels: tuple[int, int], radius_px: float
) -> Tensor:
    """Foreground clicks, background clicks and boxes: (P, h, w, 3) in [0, 1].

    Clicks are Gaussian spots; a box, a top left corner followed by its bottom right one, is filled, with
    edges as soft as a cell. Everything is a product of a row and a column, so nothing of the size of
    the grid is made for each point. Arguments as in `PromptDrawing.forward`.
    """
    coords = coords.float()
    spots, insides = [], []
    for axis in (1, 0):
        cell = pixels[1 - axis] / grid[1 - axis]
        centers = (torch.arange(grid[1 - axis], device=coords.device) + 0.5) * cell
        along = coords[..., axis, None]
        # A click is the index of a pixel, a box has edges.
        spots.append(torch.exp(-0.5 * ((centers - along - 0.5) / radius_px) ** 2))
        after_start = torch.sigmoid((centers - along[:, :-1]) * (2 / cell))
        insides.append(after_start * torch.sigmoid((along[:, 1:] - centers) * (2 / cell)))
    is_box = (labels[:, :-1] == BOX_TOP_LEFT) & (labels[:, 1:] == BOX_BOTTOM_RIGHT)
    drawn = [
        _sum_of_products(spots, labels == FOREGROUND),
        _sum_of_products(spots, labels == BACKGROUND),
        _sum_of_products(insides, is_box),
    ]
    return torch.stack(drawn, dim=-1).clamp(max=1.0)


def _sum_of_products(rows_and_columns: list[Tensor], counts: Tensor) -> Tensor:
    """(P, N, h) and (P, N, w) of the N that count to (P, h, w)."""
    rows, columns = rows_and_columns
    return (rows * counts[..., None].to(rows.dtype)).transpose(1, 2) @ columns
