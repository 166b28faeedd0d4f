"""The decoder's transformer: tokens look at the image, the image looks back (SAM, figure 14)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.plain import is_plain
from sam_train.models.products import LINEAR, Linear, bmm


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than the embedding's.

    Between a few tokens and thousands of image tokens, the image side's projections move to the tokens
    (q . (W k) = (W^T q) . k, and the values' likewise): the same result without queries, keys or values
    the size of the image, and with fewer products while the heads' tokens are fewer than the channels.

    Args:
        embedding_dim: C.
        num_heads: heads that share the inner width.
        downsample_rate: C divided by the inner width.
    """

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        internal_dim = embedding_dim // downsample_rate
        if internal_dim % num_heads:
            raise ValueError(
                f"num_heads must divide the inner width {internal_dim}, got {num_heads}"
            )
        self.num_heads = num_heads
        self.internal_dim = internal_dim
        self.scale = (internal_dim // num_heads) ** -0.5
        self.q_proj = Linear(embedding_dim, internal_dim)
        self.k_proj = Linear(embedding_dim, internal_dim)
        self.v_proj = Linear(embedding_dim, internal_dim)
        self.out_proj = Linear(internal_dim, embedding_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends from (B, L, C) queries to (B, T, C) keys and values; returns (B, L, C)."""
        if self._folds(q) and k.shape[1] > self.internal_dim:
            return self._tokens_to_image(q, k, v)
        if self._folds(k) and q.shape[1] > self.internal_dim:
            return self._image_to_tokens(q, k, v)
        queries, keys, values = (
            self.split(projection(x)).transpose(1, 2)
            for projection, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        out = F.scaled_dot_product_attention(queries, keys, values)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _folds(self, tokens: Tensor) -> bool:
        return tokens.shape[1] * self.num_heads <= self.internal_dim and self.is_plain()

    def is_plain(self) -> bool:
        """Whether the projections' weights say all that they do."""
        return is_plain((self.q_proj, self.k_proj, self.v_proj, self.out_proj), *LINEAR)

    def split(self, x: Tensor) -> Tensor:
        """(..., heads * d) to (..., heads, d)."""
        return x.unflatten(-1, (self.num_heads, -1))

    def _tokens_to_image(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wk = self.k_proj.weight.unflatten(0, (self.num_heads, -1))
        wv = self.v_proj.weight.unflatten(0, (self.num_heads, -1))
        # The keys' bias adds the same to every score of a query, which the softmax takes out again.
        folded = torch.einsum("bthd,hdc->bthc", self.scale * self.split(self.q_proj(q)), wk)
        weights = bmm(folded.flatten(1, 2), k.transpose(1, 2)).softmax(dim=-1)
        pooled = bmm(weights, v).unflatten(1, (-1, self.num_heads))
        out = torch.einsum("bthc,hdc->bthd", pooled, wv).flatten(2) + self.v_proj.bias
        return self.out_proj(out)

    def _image_to_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wq = self.q_proj.weight.unflatten(0, (self.num_heads, -1))
        wo = self.split(self.out_proj.weight)
        keys = self.scale * self.split(self.k_proj(k))
        folded = torch.einsum("bthd,hdc->bhtc", keys, wq)
        bias = torch.einsum("bthd,hd->bht", keys, self.split(self.q_proj.bias))
        # Scores lie as (B, heads, T, L): a softmax over few tokens vectorises along the image.
        scores = bmm(folded.flatten(1, 2), q.transpose(1, 2)) + bias.flatten(1)[..., None]
        weights = scores.unflatten(1, (self.num_heads, -1)).softmax(dim=2).flatten(1, 2)
        values = torch.einsum("bthd,chd->bhtc", self.split(self.v_proj(v)), wo).flatten(1, 2)
        return bmm(weights.transpose(1, 2), values) + self.out_proj.bias

    @torch.no_grad()
    def match_queries_to_keys(self, gain: float) -> None:
        """Gives queries and keys the same orthogonal projection, scaled by `gain`.

        A click's position code then finds the image's equal code from the first step; from independent
        random projections this is learnt first, and slowly.
        """
        nn.init.orthogonal_(self.q_proj.weight, gain=gain)
        self.k_proj.weight.copy_(self.q_proj.weight)
        nn.init.zeros_(self.q_proj.bias)
        nn.init.zeros_(self.k_proj.bias)


class MLPBlock(nn.Module):
    """Two linear layers with ReLU between them, under the published names."""

    def __init__(self, embedding_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.lin1 = Linear(embedding_dim, mlp_dim)
        self.lin2 = Linear(mlp_dim, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, an MLP on the tokens, image to tokens.

    Args:
        embedding_dim: C.
        num_heads: of each attention.
        mlp_dim: inner width of the MLP.
        attention_downsample_rate: of the two cross-attentions.
        dropout: on the outputs of attentions and MLP, in training.
        skip_first_layer_pe: the first block's self-attention replaces the tokens, without their code.
        layer_norm_eps: of the four layer norms.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        attention_downsample_rate: int,
        dropout: float,
        skip_first_layer_pe: bool,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim, eps=layer_norm_eps)
        self.cross_attn_token_to_image = Attention(
            embedding_dim, num_heads, attention_downsample_rate
        )
        self.norm2 = nn.LayerNorm(embedding_dim, eps=layer_norm_eps)
        self.mlp = MLPBlock(embedding_dim, mlp_dim)
        self.norm3 = nn.LayerNorm(embedding_dim, eps=layer_norm_eps)
        self.norm4 = nn.LayerNorm(embedding_dim, eps=layer_norm_eps)
        self.cross_attn_image_to_token = Attention(
            embedding_dim, num_heads, attention_downsample_rate
        )
        self.dropout = nn.Dropout(dropout)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        queries = self.attend_to_each_other(queries, query_pe)
        k = keys + key_pe
        queries = self.update(queries, self.cross_attn_token_to_image(queries + query_pe, k, keys))
        attended = self.cross_attn_image_to_token(k, queries + query_pe, queries)
        keys = self.norm4(keys + self.dropout(attended))
        return queries, keys

    def attend_to_each_other(self, queries: Tensor, query_pe: Tensor) -> Tensor:
        """The tokens' self-attention."""
        if self.skip_first_layer_pe:
            queries = self.dropout(self.self_attn(queries, queries, queries))
        else:
            q = queries + query_pe
            queries = queries + self.dropout(self.self_attn(q, q, queries))
        return self.norm1(queries)

    def update(self, queries: Tensor, attended: Tensor) -> Tensor:
        """Adds what the tokens saw of the image, and their MLP."""
        queries = self.norm2(queries + self.dropout(attended))
        return self.norm3(queries + self.dropout(self.mlp(queries)))


class TwoWayTransformer(nn.Module):
    """`depth` two-way blocks and a last look of the tokens at the image.

    Args:
        depth: number of blocks: 2, or 3 for the automatic model (SAM, appendix B).
        embedding_dim: C.
        num_heads: of each attention.
        mlp_dim: inner width of the blocks' MLPs.
        attention_downsample_rate: of the cross-attentions.
        dropout: 0.1 in SAM's training; never active in eval mode.
        layer_norm_eps: of the blocks' layer norms: 1e-5 as published, 1e-6 in `transformers`.
        matched_qk_gain: if set, the cross-attentions start with equal orthogonal query and key
            projections of this gain (see `Attention.match_queries_to_keys`); for training from
            random weights.
    """

    def __init__(
        self,
        *,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        attention_downsample_rate: int = 2,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        matched_qk_gain: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.layer_norm_eps = layer_norm_eps
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(
                embedding_dim,
                num_heads,
                mlp_dim,
                attention_downsample_rate,
                dropout,
                skip_first_layer_pe=i == 0,
                layer_norm_eps=layer_norm_eps,
            )
            for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(
            embedding_dim, num_heads, attention_downsample_rate
        )
        self.norm_final_attn = nn.LayerNorm(embedding_dim)
        if matched_qk_gain is not None:
            for name, module in self.named_modules():
                if isinstance(module, Attention) and not name.endswith("self_attn"):
                    module.match_queries_to_keys(matched_qk_gain)

    def blocks(self) -> list[TwoWayAttentionBlock]:
        """`layers`, with their type."""
        return cast(list[TwoWayAttentionBlock], list(self.layers))

    def _is_plain(self) -> bool:
        """Whether `SharedImage`, which reads the weights of what looks at the image, leaves nothing out."""
        if not is_plain((self,), TwoWayTransformer):
            return False
        blocks = self.blocks()
        if not is_plain(blocks, TwoWayAttentionBlock):
            return False
        looks = [self.final_attn_token_to_image]
        for block in blocks:
            looks += [block.cross_attn_token_to_image, block.cross_attn_image_to_token]
        norms = [block.norm4 for block in blocks]
        return (
            is_plain(looks, Attention)
            and all(attention.is_plain() for attention in looks)
            and is_plain(norms, nn.LayerNorm)
        )

    def keeps_rows(self, num_tokens: int, num_own_rows: int) -> bool:
        """Whether `SharedImage` is this transformer's equal and, by its rows, the cheaper form.

        Args:
            num_tokens: T.
            num_own_rows: rows of a prompt before the first layer.
        """
        if not self._is_plain():
            return False
        if self.training and any(layer.dropout.p for layer in self.blocks()):
            return False  # dropout of image tokens leaves them in no sum of few rows
        rows = num_own_rows + len(self.layers) * (self.num_heads * num_tokens + 1)
        return 0 < rows <= self.norm_final_attn.normalized_shape[0]

    def forward(
        self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lets tokens and image tokens inform each other.

        Args:
            image_embedding: (B, C, h, w), the prompts' dense part added.
            image_pe: (B or 1, C, h, w) position code of the image tokens.
            point_embedding: (B, T, C) tokens.

        Returns:
            The tokens (B, T, C) and the image tokens (B, h * w, C).
        """
        keys = image_embedding.flatten(2).transpose(1, 2)
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries, keys, query_pe=point_embedding, key_pe=key_pe)
        attended = self.final_attn_token_to_image(queries + point_embedding, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys
