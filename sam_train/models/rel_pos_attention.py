"""Attention with decomposed relative positions by torch's kernels (Li et al. 2022, ViTDet).

scores[q, k] = scale * q . k + along_rows[q, row of k] + along_columns[q, column of k]

For 64 x 64 tokens, scores and biases are 67 MB a head each. Of so many (`STORED_TOKENS`), the two sums join
the dot product: queries grow by their biases, keys by which row and column they are in, so that attention
kernels that know no such bias apply. `windowed_attention` is the form for the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor

STORED_TOKENS = 512
"""Up to so many tokens, the bias is kept as a matrix."""


def attend_in_windows(
    qkv: Tensor, rel_pos: tuple[Tensor, Tensor], window: tuple[int, int], padding: Tensor | None
) -> Tensor:
    """`windowed_attention` by torch's kernels: (N, H, W, 3, heads, d) to (N, H, W, heads * d)."""
    n, height, width, _, num_heads, d = qkv.shape
    (h, w), tokens = window, qkv
    above, beside = -(-height // h), -(-width // w)
    if padding is not None:
        tokens = padding.to(qkv.dtype).expand(n, above * h, beside * w, -1, -1, -1).clone()
        tokens[:, :height, :width] = qkv
    windows = tokens.unflatten(2, (beside, w)).unflatten(1, (above, h))
    windows = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 4)
    queries, keys, values = windows.unbind(0)
    out = rel_pos_attention(queries, keys, values, rel_pos, window)
    out = out.unflatten(1, window).unflatten(0, (n, above, beside, num_heads))
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(n, above * h, beside * w, num_heads * d)
    return out[:, :height, :width]


def rel_pos_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rel_pos: tuple[Tensor, Tensor],
    size: tuple[int, int],
) -> Tensor:
    """Attends within an (h, w) grid of tokens.

    Args:
        queries, keys, values: (B, h * w, d), B heads.
        rel_pos: embeddings of vertical and horizontal distances, (2h - 1, d) and (2w - 1, d), or of
            another length, which is interpolated.
        size: (h, w).

    Returns:
        (B, h * w, d).
    """
    (h, w), grid = size, queries.unflatten(1, size)
    along_rows = torch.einsum("bhwc,hkc->bhwk", grid, get_rel_pos(h, h, rel_pos[0])).flatten(1, 2)
    along_columns = torch.einsum("bhwc,wkc->bhwk", grid, get_rel_pos(w, w, rel_pos[1])).flatten(
        1, 2
    )
    if h * w <= STORED_TOKENS or (not torch.compiler.is_compiling() and torch._C._is_tracing()):
        bias = along_rows[..., None] + along_columns[..., None, :]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.flatten(2))
    rows = torch.eye(h, dtype=keys.dtype, device=keys.device).repeat_interleave(w, dim=0)
    columns = torch.eye(w, dtype=keys.dtype, device=keys.device).repeat(h, 1)
    places = torch.cat([rows, columns], dim=1).expand(len(keys), -1, -1)
    scale = queries.shape[-1] ** -0.5
    queries = torch.cat([scale * queries, along_rows, along_columns], dim=2)
    return F.scaled_dot_product_attention(
        queries[None], torch.cat([keys, places], dim=2)[None], values[None], scale=1.0
    )[0]
