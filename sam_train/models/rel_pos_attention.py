"""Attention with decomposed relative positions by torch's kernels (Li et al. 2022, ViTDet).

scores[q, k] = scale * q . k + along_rows[q, row of k] + along_columns[q, column of k]

For 64 x 64 tokens, scores and biases are 67 MB a head each. There the two sums join the dot product: queries
grow by their biases, keys by which row and column they are in, so that attention kernels that know no such
bias apply. `windowed_attention` is the form for the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import get_rel_pos, window_partition, window_unpartition
from torch import Tensor

STORED_TOKENS = 512
"""Up to so many tokens, the bias is kept as a matrix."""


def attend_in_windows(
    qkv: Tensor, rel_pos: tuple[Tensor, Tensor], window: tuple[int, int], padding: Tensor | None
) -> Tensor:
    """`windowed_attention` by torch's kernels: (N, H, W, 3, heads, d) to (N, H, W, heads * d)."""
    n, height, width, _, num_heads, _ = qkv.shape
    size, tokens = (height, width), qkv.flatten(3)
    padded = (-(-height // window[0]) * window[0], -(-width // window[1]) * window[1])
    if padding is not None:
        whole = padding.flatten().to(qkv.dtype).expand(n, *padded, -1).clone()
        whole[:, :height, :width] = tokens
        tokens = whole
    is_one = padded == window
    if not is_one:
        tokens, _ = window_partition(tokens, window[0])
    heads = tokens.flatten(1, 2).unflatten(2, (3, num_heads, -1))
    queries, keys, values = heads.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
    out = rel_pos_attention(queries, keys, values, rel_pos, window)
    out = out.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2).unflatten(1, window)
    return out if is_one else window_unpartition(out, window[0], size, padded)


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
