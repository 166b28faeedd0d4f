"""The engine's configuration: `conf/engine.yaml` with its groups, kept in ROOT/engine.yaml from `init` on.

It is kept with its interpolations, so that the folder may move, and may be edited by hand between two
rounds. What is said on the command line of a later verb counts for that call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sam_train import config
from sam_train.ops.files import write_atomically

FILE = "engine.yaml"
OF_CALLS = tuple(
    "root images annotations image reason who out of_round tune all worker num_workers promote_model".split()
)
"""What a call says, and the file does not keep."""


def composed(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """What a command line alone gives."""
    return config.compose("engine", overrides, config_dir=config_dir)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """As plain values, interpolations replaced."""
    return config.plain(cfg, resolve=True)


def write(root: Path, cfg: DictConfig) -> None:
    """Keeps a configuration in an engine's folder."""
    kept = {
        name: value
        for name, value in config.plain(cfg, resolve=False).items()
        if name not in OF_CALLS
    }
    write_atomically(root / FILE, yaml.safe_dump(kept, sort_keys=False))


def read(
    root: Path, overrides: Sequence[str] = (), config_dir: str | None = None
) -> dict[str, Any]:
    """An engine's configuration with a call's changes, as plain values.

    Raises:
        FileNotFoundError: there is no engine.
        ValueError: its file cannot be read, or the call changes what it cannot.
    """
    path = root / FILE
    try:
        stored = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{root} holds no engine (no {FILE}): data-engine init root={root} images=... "
            "checkpoint=... makes one, or goes on with making it"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no readable configuration: {reason}") from None
    if not isinstance(stored, DictConfig):
        raise ValueError(f"{path} is no readable configuration: expected names and values")
    changes = composed(overrides, config_dir)
    with open_dict(stored):
        for name in OF_CALLS:
            stored[name] = config.plain(changes, resolve=False)[name]
        for override in overrides:
            name = override.partition("=")[0].lstrip("+~")
            _change(stored, changes, name, path)
        stored.root = os.path.abspath(root)
    return resolved(stored)


def _change(stored: DictConfig, changes: DictConfig, name: str, path: Path) -> None:
    if name in OF_CALLS:
        return
    if name == "plan":
        raise ValueError(f"the plan was chosen by init: edit plan.steps in {path}")
    group, _, package = name.partition("@")
    OmegaConf.update(stored, package or group, OmegaConf.select(changes, package or group))
