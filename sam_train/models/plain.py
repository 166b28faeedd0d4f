"""Which layers a faster path may read the weights of, and not call: those that do just what these say."""

from __future__ import annotations

from torch import nn

from sam_train.models.products import Linear


def is_plain(*layers: nn.Module, of: type[nn.Module] = nn.Linear) -> bool:
    """Whether each layer is of exactly that class, has its bias, and nothing hangs on it.

    An adapter, a subclass, a parametrization (which is a subclass), pruning and hooks change what a layer
    computes, or want to see it; such layers must be called. Costs about half a microsecond a layer.

    Args:
        layers: any modules.
        of: the class; `Linear` counts as `nn.Linear`.
    """
    for layer in layers:
        kind = type(layer)
        if kind is not of and not (kind is Linear and of is nn.Linear):
            return False
        if (
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in layer.__dict__
            or layer._parameters.get("bias", layer) is None
        ):
            return False
    return True
