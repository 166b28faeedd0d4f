"""Turns clicks, boxes and masks into the decoder's prompt embeddings (SAM, appendix A)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.common import DenseCells, Downscaling
from sam_train.models.first_guess import PromptFrame
from sam_train.models.position_encoding import PositionEmbeddingRandom
from sam_train.models.prompt_drawing import PromptDrawing
from sam_train.structures import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, PADDING, Prompts


class PromptEncoder(nn.Module):
    """Embeds prompts given in the model input frame.

    Args:
        embed_dim: C, the width of the embeddings.
        image_embedding_size: (h, w) of the image embedding; `Sam` tells it from its image encoder.
        input_image_size: (H, W) of the padded model input; likewise.
        mask_in_chans: width of the first layers that read a mask prompt.
        drawing: if set, the dense embedding also holds the clicks and boxes, drawn; the published model
            has no such part.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        image_embedding_size: tuple[int, int] = (64, 64),
        input_image_size: tuple[int, int] = (1024, 1024),
        mask_in_chans: int = 16,
        drawing: PromptDrawing | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.set_image_size(input_image_size, image_embedding_size)
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.no_mask_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = Downscaling(1, mask_in_chans, embed_dim)
        self.drawing = drawing
        self.feeds_guess = False
        """Set by `Sam` for a decoder with a first guess: hands it the prompts' numbers along with the
        embeddings, a first token of where a prompt lies and the mask prompt as last dense channels."""

    def set_image_size(
        self, input_image_size: tuple[int, int], image_embedding_size: tuple[int, int]
    ) -> None:
        """Says how large the padded model input and the image embedding are, both (H, W)."""
        self.input_image_size = input_image_size
        self.image_embedding_size = image_embedding_size
        self.mask_input_size = (4 * image_embedding_size[0], 4 * image_embedding_size[1])

    def get_dense_pe(self) -> Tensor:
        """The position code of every image token: (1, C, h, w)."""
        return self.pe_layer(self.image_embedding_size)[None]

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeds prompts as `segment_anything` does.

        Args:
            points: coordinates (P, N, 2) as (x, y) pixels and labels (P, N); a padding point is added
                where there are no boxes.
            boxes: (P, 4) xyxy pixels.
            masks: (P, 1, 4h, 4w) logits.

        Returns:
            Sparse embeddings (P, N', C) and dense embeddings (P, C, h, w).
        """
        return self.embed(self.to_prompts(points, boxes, masks))

    def to_prompts(
        self,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Prompts:
        """What `forward` takes, as one `Prompts`."""
        coords, labels = [], []
        if points is not None:
            coords.append(points[0])
            labels.append(points[1].long())
            if boxes is None:
                coords.append(points[0].new_zeros(len(points[0]), 1, 2))
                labels.append(labels[0].new_full((len(points[0]), 1), PADDING))
        if boxes is not None:
            coords.append(boxes.reshape(-1, 2, 2))
            corners = torch.tensor([[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]], device=boxes.device)
            labels.append(corners.expand(len(coords[-1]), 2))
        if coords:
            return Prompts(torch.cat(coords, dim=1), torch.cat(labels, dim=1), masks)
        device = self.no_mask_embed.weight.device
        num_prompts = 1 if masks is None else len(masks)
        no_points = torch.zeros(num_prompts, 0, 2, device=device)
        return Prompts(no_points, no_points[..., 0].long(), masks)

    def embed(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Embeds `Prompts` of the model input frame; nothing is added to them.

        Returns:
            Sparse embeddings (P, N, C) and dense embeddings (P, C, h, w); more of both if
            `feeds_guess`.
        """
        sparse, dense = self.embed_unread(prompts)
        return sparse, dense if isinstance(dense, Tensor) else dense.embeddings()

    def embed_unread(self, prompts: Prompts) -> tuple[Tensor, Tensor | DenseCells]:
        """`embed`, but where there are masks alone the last layer that reads them is left to the decoder.

        Few channels take the decoder less time than C of them.
        """
        coords, labels, masks = prompts
        sparse = self.embed_points(coords, labels)
        if masks is not None:
            masks = masks.to(self.no_mask_embed.weight.dtype)
        reads_all = self.drawing is None and not self.feeds_guess
        if masks is not None and reads_all and self.mask_downscaling.is_plain():
            return sparse, self.mask_downscaling.cells(masks.permute(0, 2, 3, 1))
        dense = self.embed_masks(masks, len(coords))
        if self.drawing is not None:
            grid, pixels = self.mask_input_size, self.input_image_size
            dense = dense + self.drawing(coords, labels, grid, pixels)
        if self.feeds_guess:
            frame = PromptFrame.of_prompts(
                coords, labels, self.input_image_size, corrects=masks is not None
            )
            sparse = torch.cat([frame.as_token(self.embed_dim, sparse.dtype), sparse], dim=1)
            if masks is not None:
                logits = F.pixel_unshuffle(masks, self.mask_input_size[0] // dense.shape[-2])
                dense = torch.cat([dense, logits.to(dense.dtype)], dim=1)
        return sparse, dense

    def embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        # Clicks are pixel indices, which name a corner; the code is of the pixel's centre.
        code = self.pe_layer.forward_with_coords(coords + 0.5, self.input_image_size)
        # One table and one look-up, so that every kind takes part in every backward pass: a rank that
        # happens to draw no background click would otherwise stall a distributed run.
        kinds = [self.not_a_point_embed, *self.point_embeddings]
        table = torch.cat([kind.get_parameter("weight") for kind in kinds])
        is_point = (labels != PADDING).to(code.dtype)[..., None]
        return code * is_point + table[labels + 1]

    def embed_masks(self, masks: Tensor | None, num_prompts: int) -> Tensor:
        if masks is not None:
            return self.mask_downscaling(masks.permute(0, 2, 3, 1))
        dense = self.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return dense.expand(num_prompts, -1, *self.image_embedding_size)
