"""The first layer's looks, while all prompts still see one image, but for what a few channels add.

Before the first layer, the image tokens of a prompt are

    images[image_index] + cells^T cell_rows

so that the image is projected once for all prompts at it, and a mask that was fed back by its few channels.
Only after the layer each prompt has image tokens of its own.

Shapes: P prompts, N images, L image tokens, C channels, H heads of width d, T tokens, K cell channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sam_train.models.folded_looks import add_rows


class FirstImages(NamedTuple):
    """The image tokens before the first layer.

    Attributes:
        images: (N, L, C), with what all prompts' dense embeddings share.
        image_index: (P,) the image of each prompt.
        cells: (P, K, L), None where no mask was fed back.
        cell_rows: (K, C).
    """

    images: Tensor
    image_index: Tensor
    cells: Tensor | None = None
    cell_rows: Tensor | None = None

    def scores(self, tokens: Tensor, projected: Tensor, weight: Tensor) -> Tensor:
        """Products of (P, H, T, d) tokens with the image tokens of their prompts: (P, H, T, L).

        Args:
            tokens: (P, H, T, d).
            projected: (N, H, d, L), the images by the layer whose weight is
            weight: (H, d, C).
        """
        scores = self._by_image(tokens, projected)
        if self.cells is None:
            return scores
        of_cells = self._of_cells(weight)
        along = torch.einsum("phtd,khd->phtk", tokens, of_cells).flatten(1, 2)
        return scores + torch.bmm(along, self.cells).view_as(scores)

    def means(self, shares: Tensor, projected: Tensor, weight: Tensor) -> Tensor:
        """Sums of the image tokens, projected, by (P, H, T, L) shares: (P, H, T, d).

        Args:
            projected: (N, H, L, d), the images by the layer whose weight is
            weight: (H, d, C).
        """
        means = self._by_image(shares, projected)
        if self.cells is None:
            return means
        along = torch.bmm(shares.flatten(1, 2), self.cells.mT).view(*means.shape[:3], -1)
        return means + torch.einsum("phtk,khd->phtd", along, self._of_cells(weight))

    def plus(self, shares: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The image tokens with (P, R, C) values by (P, R, L) shares and a bias (C,): (P, L, C)."""
        images = self.images + bias
        if self.cells is None or self.cell_rows is None:
            return add_rows(images, self.image_index, shares, values)
        own = self.cell_rows.expand(len(values), -1, -1)
        weights, rows = torch.cat([self.cells, shares], dim=1), torch.cat([own, values], dim=1)
        return add_rows(images, self.image_index, weights, rows)

    def _by_image(self, rows: Tensor, projected: Tensor) -> Tensor:
        """(P, H, T, a) by the (N, H, a, b) of their images: (P, H, T, b)."""
        num_images, num_prompts = len(projected), len(rows)
        each = num_prompts // max(1, num_images)
        numbers = torch.arange(num_images, device=rows.device).repeat_interleave(each)
        if not each or not torch.equal(numbers, self.image_index):
            return rows @ projected.index_select(0, self.image_index)
        # As many for each image, one image after the other: an image's all at once, without a copy of it.
        together = rows.unflatten(0, (num_images, each)).transpose(1, 2).flatten(2, 3)
        apart = (together @ projected).unflatten(2, (each, -1)).transpose(1, 2)
        return apart.flatten(0, 1)

    def _of_cells(self, weight: Tensor) -> Tensor:
        assert self.cell_rows is not None
        return torch.einsum("kc,hdc->khd", self.cell_rows, weight)
