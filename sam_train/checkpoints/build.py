"""From a description of a model, a plain dict or a name in `conf/model/`, to the model."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sam_train import config
from sam_train.models.sam import Sam


def build_model(node: Mapping[str, Any]) -> Sam:
    """Builds a model from the plain dict of its config node.

    The dict may come out of a checkpoint that nobody vouches for, so only the project's own models and
    their parts are built, and nothing is downloaded: `pretrained` is off, the weights come afterwards.

    Args:
        node: `_target_` and that class's keyword arguments, nested.

    Raises:
        ValueError: a `_target_` is no class of `sam_train.models`, or its arguments do not fit.
    """
    model = _build(node)
    if not isinstance(model, Sam):
        raise ValueError(f"expected the description of a Sam, got {type(model).__name__}")
    return model


def build_part(node: Any) -> Any:
    """`build_model` for any model of the project, or a plain value that describes none.

    Raises:
        ValueError: as `build_model`.
    """
    return _build(node)


def model_config(
    name: str, overrides: Sequence[str] = (), *, config_dir: str | Path | None = None
) -> dict[str, Any]:
    """The plain dict of `conf/model/NAME.yaml`.

    Args:
        name: such as "sam_vit_b".
        overrides: changes in Hydra's syntax, such as "model.image_encoder.img_size=512".
        config_dir: a user's folder, whose names win over the packaged ones.
    """
    names = config.options("model", config_dir)
    if name not in names:
        raise ValueError(f"no model is called {name!r}; expected one of {', '.join(names)}")
    cfg = config.compose(f"model/{name}", overrides, config_dir=config_dir)
    return config.plain(cfg.model, resolve=True)


def _build(node: Any) -> Any:
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_build(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    arguments = {str(key): _build(child) for key, child in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    if "pretrained" in arguments:
        arguments["pretrained"] = False
    try:
        return model_class(node["_target_"])(**arguments)
    except (TypeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{node['_target_']} cannot be built: {error}") from error


def check_targets(node: Any) -> None:
    """Sees that a description builds nothing but the project's own models.

    Raises:
        ValueError: a `_target_` in it is no class of `sam_train.models`.
    """
    if isinstance(node, Sequence) and not isinstance(node, str):
        for child in node:
            check_targets(child)
    if isinstance(node, Mapping):
        if "_target_" in node:
            model_class(node["_target_"])
        for child in node.values():
            check_targets(child)


def model_class(target: Any) -> type[nn.Module]:
    match = re.fullmatch(r"(sam_train\.models\.\w+)\.(\w+)", str(target))
    if match:
        try:
            found = getattr(importlib.import_module(match[1]), match[2], None)
        except ModuleNotFoundError:
            found = None
        # A module of ours also holds what it imported: `Module`, `timm`, ...
        is_model = isinstance(found, type) and issubclass(found, nn.Module)
        if found is not None and is_model and found.__module__.startswith("sam_train.models."):
            return found
    raise ValueError(f"expected a _target_ that is a model below sam_train.models, got {target!r}")
