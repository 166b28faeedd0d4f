"""The decoder's transformer: tokens look at the image, the image looks back (SAM, figure 14)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.first_looks import FirstImages
from sam_train.models.folded_looks import (
    LookBack,
    SoftmaxOfTokens,
    image_to_tokens,
    tokens_to_image,
)
from sam_train.models.per_head import per_head
from sam_train.models.plain import is_plain
from sam_train.models.products import Linear, bmm, is_plain_cpu, linear


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than the embedding's.

    Between a few tokens and thousands of image tokens, the image side's projections move to the tokens
    (q . (W k) = (W^T q) . k, and the values' likewise): the same result without queries, keys or values
    the size of the image, and with fewer products while the heads' tokens are fewer than the channels.
    That reads the weights of layers; those that are not plain are called (`is_plain`).

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
        if self.is_folded(q, k):
            return self._tokens_to_image(q, k, v)
        if q.shape[1] > self.internal_dim and self._folds(k, self.q_proj, self.out_proj):
            return self._image_to_tokens(q, k, v)
        queries, keys, values = (
            self.split(projection(x)).transpose(1, 2)
            for projection, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        out = F.scaled_dot_product_attention(queries, keys, values)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def is_folded(self, tokens: Tensor, image: Tensor) -> bool:
        """Whether tokens look at so many image tokens that the image's projections better move to them."""
        return image.shape[1] > self.internal_dim and self._folds(tokens, self.k_proj, self.v_proj)

    def _folds(self, tokens: Tensor, *of_image: nn.Module) -> bool:
        return tokens.shape[1] * self.num_heads <= self.internal_dim and is_plain(*of_image)

    def split(self, x: Tensor) -> Tensor:
        """(..., heads * d) to (..., heads, d)."""
        return x.unflatten(-1, (self.num_heads, -1))

    def by_heads(self, x: Tensor) -> Tensor:
        """(B, L, heads * d) to (B, heads, L, d)."""
        return self.split(x).transpose(1, 2)

    def weight_by_heads(self, layer: nn.Linear) -> Tensor:
        """(heads, d, C) of one of the three projections."""
        return layer.weight.unflatten(0, (self.num_heads, -1))

    def _tokens_to_image(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = bmm(self.folded_queries(q), k.transpose(1, 2)).softmax(dim=-1)
        return self.taken(bmm(weights, v))

    def folded_queries(self, q: Tensor) -> Tensor:
        """(B, T, C) to (B, T * heads, C): scaled, the keys' projection folded into them."""
        # The keys' bias adds the same to every score of a query, which the softmax takes out again.
        queries = self.scale * self.split(self.q_proj(q))
        return per_head(queries, self.weight_by_heads(self.k_proj)[None]).flatten(1, 2)

    def taken(self, pooled: Tensor) -> Tensor:
        """What the queries take of the (B, T * heads, C) means that they made: (B, T, C)."""
        by_head = pooled.unflatten(1, (-1, self.num_heads))
        out = per_head(by_head, self.weight_by_heads(self.v_proj).transpose(1, 2)[None])
        return self.out_proj(out.flatten(2) + self.v_proj.bias)

    def _image_to_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        folded, bias = self.folded_keys(k)
        # Scores lie as (B, T, heads, L): a softmax over few tokens vectorises along the image.
        scores = bmm(folded, q.transpose(1, 2)) + bias[..., None]
        weights = scores.unflatten(1, (-1, self.num_heads)).softmax(dim=1).flatten(1, 2)
        return bmm(weights.transpose(1, 2), self.folded_values(v)) + self.out_proj.bias

    def folded_keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) to (B, T * heads, C): scaled, the queries' projection folded in; its bias, (B, T * heads)."""
        keys = self.scale * self.split(self.k_proj(k))
        folded = per_head(keys, self.weight_by_heads(self.q_proj)[None])
        bias = (keys * self.split(self.q_proj.bias)).sum(dim=-1)
        return folded.flatten(1, 2), bias.flatten(1)

    def folded_values(self, v: Tensor) -> Tensor:
        """(B, T, C) to (B, T * heads, C): projected, the last layer's projection folded in, not its bias."""
        wo = self.split(self.out_proj.weight).permute(1, 2, 0)
        return per_head(self.split(self.v_proj(v)), wo[None]).flatten(1, 2)

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


def folds_in_cache(attention: Attention, tokens: Tensor, image: Tensor) -> bool:
    """Whether `tokens_to_image` is the equal of an attention of (B, T, C) tokens to (B, L, C) image tokens."""
    return (
        is_plain_cpu(image)
        and image.dtype == tokens.dtype
        and is_plain(attention, of=Attention)
        and attention.is_folded(tokens, image)
    )


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
        if self.looks_in_cache(queries, keys):
            return self._look_in_cache(queries, keys, query_pe, key_pe)
        k = keys + key_pe
        queries = self.update(queries, self.cross_attn_token_to_image(queries + query_pe, k, keys))
        attended = self.cross_attn_image_to_token(k, queries + query_pe, queries)
        keys = self.norm4(keys + self.dropout(attended))
        return queries, keys

    def looks_in_cache(self, queries: Tensor, keys: Tensor) -> bool:
        """Whether `folded_looks` is the equal of the two cross-attentions and the norm after them."""
        looks, looked = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        return (
            is_plain(looked, of=Attention)
            and is_plain(looked.q_proj, looked.out_proj)
            and is_plain(self.dropout, of=nn.Dropout)
            and not (self.dropout.training and self.dropout.p)
            and folds_in_cache(looks, queries, keys)
        )

    def _look_in_cache(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        looks, looked = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        pooled, seen = tokens_to_image(looks.folded_queries(queries + query_pe), keys, key_pe)
        queries = self.update(queries, looks.taken(pooled))
        # Shares of a head sum to one, so that a part of the bias in every value adds up to all of it.
        values = looked.folded_values(queries) + looked.out_proj.bias / looked.num_heads
        look = LookBack(*looked.folded_keys(queries + query_pe), values)
        keys = self.norm4(image_to_tokens(seen, key_pe, look, looked.num_heads))
        return queries, keys

    def look_first(
        self, queries: Tensor, start: FirstImages, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward` where `looks_in_cache`, for image tokens that prompts share but for a few channels."""
        queries = self.attend_to_each_other(queries, query_pe)
        looks, looked = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        seen = start.images + key_pe
        asked = looks.split(looks.scale * looks.q_proj(queries + query_pe))
        # Without the bias, which the softmax takes out again.
        keys = looks.by_heads(linear(seen, looks.k_proj.weight)).mT
        shares = start.scores(asked, keys, looks.weight_by_heads(looks.k_proj)).softmax(dim=-1)
        taken = looks.by_heads(looks.v_proj(start.images))
        taken = start.means(shares, taken, looks.weight_by_heads(looks.v_proj))
        queries = self.update(queries, looks.out_proj(taken.flatten(2)))
        asked = looked.by_heads(looked.q_proj(seen)).mT
        keys = looked.split(looked.scale * looked.k_proj(queries + query_pe))
        scores = start.scores(keys, asked, looked.weight_by_heads(looked.q_proj))
        shares = SoftmaxOfTokens.apply(scores)
        attended = start.plus(
            shares.flatten(1, 2), looked.folded_values(queries), looked.out_proj.bias
        )
        return queries, self.norm4(attended)

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
        self.embedding_dim = embedding_dim
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

    def keeps_rows(self, num_tokens: int, num_own_rows: int) -> bool:
        """Whether `SharedImage` is this transformer's equal and, by its rows, the cheaper form.

        Args:
            num_tokens: T.
            num_own_rows: rows of a prompt before the first layer.
        """
        rows = num_own_rows + len(self.layers) * (self.num_heads * num_tokens + 1)
        if not len(self.layers) or rows > self.embedding_dim:
            return False
        return self._is_plain()

    def _is_plain(self) -> bool:
        """Whether the image side may be computed from weights, without a call of its layers."""
        blocks, last = self.blocks(), self.final_attn_token_to_image
        if not is_plain(self, of=TwoWayTransformer):
            return False
        if not is_plain(*blocks, of=TwoWayAttentionBlock):
            return False
        looks = [block.cross_attn_token_to_image for block in blocks]
        looks += [block.cross_attn_image_to_token for block in blocks]
        dropouts = [block.dropout for block in blocks]
        # Dropout of image tokens leaves them in no sum of few rows.
        return (
            is_plain(*looks, last, of=Attention)
            and all(is_plain(x.q_proj, x.k_proj, x.v_proj, x.out_proj) for x in (*looks, last))
            and is_plain(*(block.norm4 for block in blocks), of=nn.LayerNorm)
            and is_plain(*dropouts, of=nn.Dropout)
            and not any(dropout.training and dropout.p for dropout in dropouts)
        )

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
        return self._look_on(point_embedding, keys, point_embedding, key_pe, self.blocks())

    def forward_shared(
        self, start: FirstImages, image_pe: Tensor, point_embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward` for image tokens that prompts share but for a few channels, where `shares_first_layer`."""
        key_pe = image_pe.flatten(2).transpose(1, 2)
        first, *others = self.blocks()
        queries, keys = first.look_first(point_embedding, start, point_embedding, key_pe)
        return self._look_on(queries, keys, point_embedding, key_pe, others)

    def shares_first_layer(self, images: Tensor, tokens: Tensor) -> bool:
        """Whether the first layer may project (N, L, C) images instead of each prompt's image tokens."""
        if not len(self.layers) or not is_plain(self, of=TwoWayTransformer):
            return False
        first = self.blocks()[0]
        return is_plain(first, of=TwoWayAttentionBlock) and first.looks_in_cache(tokens, images)

    def _look_on(
        self,
        queries: Tensor,
        keys: Tensor,
        query_pe: Tensor,
        key_pe: Tensor,
        layers: list[TwoWayAttentionBlock],
    ) -> tuple[Tensor, Tensor]:
        for layer in layers:
            queries, keys = layer(queries, keys, query_pe=query_pe, key_pe=key_pe)
        last = self.final_attn_token_to_image
        if folds_in_cache(last, queries, keys):
            pooled, seen = tokens_to_image(last.folded_queries(queries + query_pe), keys, key_pe)
            attended, keys = last.taken(pooled), seen.image
        else:
            attended = last(queries + query_pe, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys
