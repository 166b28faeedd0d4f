"""A block of SAM's image encoder: attention in windows, or over the whole grid, and an MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models.vision_transformer_sam import (
    Attention,
    Block,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from sam_train.models import compiled
from sam_train.models.gelu import gelu
from sam_train.models.plain import is_plain
from sam_train.models.products import is_plain_cpu, linear_gelu, takes_products
from sam_train.models.rel_pos_attention import attend_in_windows
from sam_train.models.windowed_attention import (
    attends_in_pieces,
    windowed_answers,
    windowed_attention,
)

MLP_TOKENS = 4096
"""Tokens that the MLP takes at a time where its inner layer lies in memory that is used again."""


class WindowedBlock(Block):
    """timm's block, with `windowed_attention`, and no linear layer over the padding of windows.

    Windows of 14 cut 16 x 16 tokens (256 px) into 28 x 28, two thirds of it padding. Its queries, keys and
    values are one vector, its answers are thrown away: the same result. Stochastic depth drops a block for
    a whole image, not for a window of it. Other attentions and MLPs, put in their places, are called.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self._adds_in_place(x):
            x = self._add_attention(x.contiguous())
            return self._add_mlp(x)
        attend = self._attend if self._attends_by_rel_pos() else self._call_attention
        # The patch embedding leaves its channels apart, as every sum and norm after it would.
        x = x.contiguous()
        x = x + self.drop_path1(self.ls1(attend(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self._mlp(self.norm2(x))))

    def _attends_by_rel_pos(self) -> bool:
        """Whether `_attend` is what a call of the attention is; its qkv and proj are called in both."""
        attention = self.attn
        if not is_plain(attention, of=Attention) or not attention.use_rel_pos:
            return False
        dropouts = (attention.attn_drop, attention.proj_drop)
        return (
            attention.rope is None
            and is_plain(attention.q_norm, attention.k_norm, of=nn.Identity)
            and is_plain(*dropouts, of=nn.Dropout)
            and not any(dropout.training and dropout.p for dropout in dropouts)
        )

    def _adds_in_place(self, x: Tensor) -> bool:
        """Whether products may be added to the sums as MKL makes them, and biases once for all."""
        block: Any = self
        return (
            not torch.is_grad_enabled()
            and is_plain_cpu(x)
            and not takes_products(x)
            and self._attends_by_rel_pos()
            and is_plain(self.attn.qkv, self.attn.proj)
            and self._has_plain_mlp()
            and is_plain(block.mlp.fc2)
            # Other classes of tensors, such as quantised ones, know what a linear layer is, and no more.
            and all(type(layer.weight) is nn.Parameter for layer in _linears(block))
            and is_plain(block.ls1, block.ls2, of=nn.Identity)
            and all(
                is_plain(drop, of=nn.Identity)
                or (is_plain(drop, of=DropPath) and not drop.training)
                for drop in (block.drop_path1, block.drop_path2)
            )
        )

    def _add_attention(self, x: Tensor) -> Tensor:
        attention = self.attn
        biases = attention.qkv.bias.view(3, attention.num_heads, -1)
        qkv = F.linear(self.norm1(x), attention.qkv.weight).unflatten(-1, biases.shape)
        rel_pos = (attention.rel_pos_h, attention.rel_pos_w)
        answers = windowed_answers(
            qkv, rel_pos, self._window(x), torch.zeros_like(biases), query_bias=biases[0]
        )
        # The keys' bias adds the same to all scores of a query, the values' to every answer.
        bias = torch.addmv(attention.proj.bias, attention.proj.weight, biases[2].flatten())
        sums = x + bias
        sums.flatten(0, 2).addmm_(answers.flatten(0, 2), attention.proj.weight.mT)
        return sums

    def _add_mlp(self, x: Tensor) -> Tensor:
        mlp: Any = self.mlp
        inputs, sums = self.norm2(x).flatten(0, 2), x + mlp.fc2.bias
        is_compiled = compiled.takes(inputs, mlp.fc1.bias) and len(mlp.fc1.bias) == len(
            mlp.fc1.weight
        )
        num = min(len(inputs), MLP_TOKENS)
        hidden = inputs.new_empty(num, len(mlp.fc1.weight))
        for some, onto in zip(inputs.split(num), sums.flatten(0, 2).split(num), strict=True):
            inner = torch.mm(some, mlp.fc1.weight.mT, out=hidden[: len(some)])
            if is_compiled:
                compiled.bias_gelu(inner, mlp.fc1.bias)
            else:
                torch.ops.aten.gelu_(inner.add_(mlp.fc1.bias))
            onto.addmm_(inner, mlp.fc2.weight.mT)
        return sums

    def _call_attention(self, x: Tensor) -> Tensor:
        if not self.window_size:
            return self.attn(x)
        size = (x.shape[1], x.shape[2])
        windows, padded = window_partition(x, self.window_size)
        return window_unpartition(self.attn(windows), self.window_size, size, padded)

    def _attend(self, x: Tensor) -> Tensor:
        attention, (height, width) = self.attn, x.shape[1:3]
        h, w = window = self._window(x)
        qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))
        padding = None
        if height % h or width % w:
            padding = attention.qkv(x.new_zeros(1, 1, 1, x.shape[-1])).view(qkv.shape[3:])
        rel_pos = (attention.rel_pos_h, attention.rel_pos_w)
        attend = windowed_attention if attends_in_pieces(qkv, h * w) else attend_in_windows
        return attention.proj(attend(qkv, rel_pos, window, padding))

    def _window(self, x: Tensor) -> tuple[int, int]:
        """(h, w) of the windows in (N, H, W, C)."""
        side = self.window_size
        return (side, side) if side else (x.shape[1], x.shape[2])

    def _mlp(self, x: Tensor) -> Tensor:
        if not self._has_plain_mlp():
            return self.mlp(x)
        mlp: Any = self.mlp
        if torch.is_grad_enabled():
            return mlp.fc2(gelu(mlp.fc1(x)))
        return mlp.fc2(linear_gelu(x, mlp.fc1.weight, mlp.fc1.bias))

    def _has_plain_mlp(self) -> bool:
        mlp: Any = self.mlp
        return (
            is_plain(mlp, of=Mlp)
            and is_plain(mlp.fc1)
            and is_plain(mlp.act, of=nn.GELU)
            and mlp.act.approximate == "none"
            and is_plain(mlp.norm, of=nn.Identity)
            and is_plain(mlp.drop1, mlp.drop2, of=nn.Dropout)
            and not any(drop.training and drop.p for drop in (mlp.drop1, mlp.drop2))
        )


def _linears(block: Any) -> tuple[nn.Linear, ...]:
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
