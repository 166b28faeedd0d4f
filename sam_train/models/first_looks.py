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

from sam_train.models.folded_looks import add_rows, is_in_turn
from sam_train.models.per_head import per_head


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
        """Products of tokens with the image tokens of their prompts: (P, T, H, L).

        Args:
            tokens: (P, T, H, d).
            projected: (N, H, d, L), the images by the layer whose weight is
            weight: (H, d, C).
        """
        scores = self._by_image(tokens, projected)
        if self.cells is None:
            return scores
        along = per_head(tokens, self._of_cells(weight)[None]).flatten(1, 2)
        return scores + torch.bmm(along, self.cells).view_as(scores)

    def means(self, shares: Tensor, projected: Tensor, weight: Tensor) -> Tensor:
        """Sums of the image tokens, projected, by (P, T, H, L) shares: (P, T, H, d).

        Args:
            projected: (N, H, L, d), the images by the layer whose weight is
            weight: (H, d, C).
        """
        means = self._by_image(shares, projected)
        if self.cells is None:
            return means
        along = torch.bmm(shares.flatten(1, 2), self.cells.mT).view(*means.shape[:3], -1)
        return means + per_head(along, self._of_cells(weight).mT[None])

    def plus(self, shares: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The image tokens with (P, R, C) values by (P, R, L) shares and a bias (C,): (P, L, C)."""
        images = self.images + bias
        if self.cells is None or self.cell_rows is None:
            return add_rows(images, self.image_index, shares, values)
        own = self.cell_rows.expand(len(values), -1, -1)
        weights, rows = torch.cat([self.cells, shares], dim=1), torch.cat([own, values], dim=1)
        return add_rows(images, self.image_index, weights, rows)

    def _by_image(self, rows: Tensor, projected: Tensor) -> Tensor:
        """(P, T, H, a) by the (N, H, a, b) of their images: (P, T, H, b)."""
        if is_in_turn(self.image_index, len(projected)):
            # An image's prompts all at once, without a copy of it.
            return per_head(rows, projected)
        own = projected.index_select(0, self.image_index)
        return (rows.transpose(1, 2) @ own).transpose(1, 2)

    def _of_cells(self, weight: Tensor) -> Tensor:
        """What the cells add to a projection by (H, d, C): (H, d, K)."""
        assert self.cell_rows is not None
        return weight @ self.cell_rows.T
