"""From image and prompt embeddings to masks and their predicted IoU (SAM, appendix A)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sam_train.models.common import MLP, LayerNorm2d, stride_two_deconv
from sam_train.models.two_way_transformer import TwoWayTransformer


class MaskDecoder(nn.Module):
    """One mask for a prompt that is clear, three candidates for one that may be ambiguous.

    Args:
        transformer_dim: C.
        transformer: the two-way transformer.
        num_multimask_outputs: candidates for a single prompt (whole, part, subpart).
        iou_head_depth: layers of the head that predicts each mask's IoU.
        iou_head_hidden_dim: its inner width.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: TwoWayTransformer,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        super().__init__()
        self.transformer_dim = transformer_dim
        self.transformer = transformer
        self.num_multimask_outputs = num_multimask_outputs
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, transformer_dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, transformer_dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(transformer_dim, transformer_dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(transformer_dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(transformer_dim // 4, transformer_dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        # One MLP a token, as in the released weights: a shared one could not load them.
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(transformer_dim, transformer_dim, transformer_dim // 8, num_layers=3)
            for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(
            transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, num_layers=iou_head_depth
        )

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        image_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicts masks.

        Args:
            image_embeddings: (N, C, h, w). Without `image_index`, N is 1, one image for all prompts.
            image_pe: (1, C, h, w) position code of the image tokens.
            sparse_prompt_embeddings: (P, T, C) of points and boxes.
            dense_prompt_embeddings: (P, C, h, w) of masks.
            multimask_output: the candidates, else the single mask's token.
            image_index: (P,) the image that each prompt belongs to.

        Returns:
            low_res_masks (P, M, 4h, 4w), logits, and iou_predictions (P, M); M is
            `num_multimask_outputs` or 1.
        """
        num_prompts = len(sparse_prompt_embeddings)
        if image_index is not None:
            image_embeddings = image_embeddings[image_index]
        elif len(image_embeddings) != 1:
            raise ValueError(
                f"expected one image embedding for all prompts, got {len(image_embeddings)}: "
                "say which image each prompt belongs to with image_index"
            )
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat(
            [output_tokens.expand(num_prompts, -1, -1), sparse_prompt_embeddings], dim=1
        )
        src = image_embeddings + dense_prompt_embeddings
        tokens, image_tokens = self.transformer(src, image_pe, tokens)
        wanted = slice(1, None) if multimask_output else slice(0, 1)
        masks = self._masks(tokens, image_tokens.unflatten(1, src.shape[-2:]), wanted)
        return masks, self.iou_prediction_head(tokens[:, 0])[:, wanted]

    def _masks(self, tokens: Tensor, src: Tensor, wanted: slice) -> Tensor:
        """Mask tokens (P, T, C) and image tokens (P, h, w, C) to logits (P, M, 4h, 4w)."""
        mask_tokens = tokens[:, 1 : 1 + self.num_mask_tokens]
        filters = torch.stack(
            [
                mlp(token)
                for mlp, token in zip(
                    self.output_hypernetworks_mlps, mask_tokens.unbind(1), strict=True
                )
            ],
            dim=1,
        )[:, wanted]
        layers: list[Any] = list(self.output_upscaling)
        upscale1, norm, act1, upscale2, act2 = layers
        x = act1(norm.over_last(stride_two_deconv(upscale1, src)))
        x = act2(stride_two_deconv(upscale2, x))
        # The 4x4 sub-pixels of every token stay in axes of their own (P, h, w, 4, 4, C) until the
        # masks, which are far smaller, are put in order.
        p, h, w = src.shape[:3]
        masks = filters @ x.flatten(1, 4).transpose(1, 2)
        masks = masks.reshape(p, -1, h, w, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.reshape(p, -1, 4 * h, 4 * w)
