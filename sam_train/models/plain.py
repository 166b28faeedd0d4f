"""Whether a layer is what it was built as, so that a faster form may read its weights instead of calling it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def is_plain(layers: Iterable[nn.Module], *kinds: type[nn.Module]) -> bool:
    """Whether all are exactly of these kinds and nothing listens to them.

    An adapter in a layer's place, a subclass, a parametrisation or a hook computes more than the weight says.
    """
    return all(type(layer) in kinds and not _has_hooks(layer) for layer in layers)


def is_plain_gelu(layer: nn.Module) -> bool:
    """Whether a layer is the exact GELU."""
    return is_plain((layer,), nn.GELU) and layer.approximate == "none"


def _has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )
