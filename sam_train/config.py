"""Finds `conf/`, composes a command's configuration and builds objects from its nodes.

Imports nothing else of the project, and nothing heavy: `sam-train --help` passes through here.
"""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict

PACKAGE_DIR = Path(__file__).resolve().parent

_COMPOSING = threading.RLock()
"""Hydra keeps what it composes from in globals: threads compose one after the other."""


def conf_dir() -> Path:
    """The folder of the packaged recipes: inside the installed package, or beside it in a checkout."""
    for folder in (PACKAGE_DIR / "conf", PACKAGE_DIR.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"the recipes are missing: neither {PACKAGE_DIR / 'conf'} nor {PACKAGE_DIR.parent / 'conf'} "
        "holds train.yaml; install the package again"
    )


def options(group: str, config_dir: str | Path | None = None) -> list[str]:
    """The names a group such as `model` or `experiment` offers; parts named `_like_this` are no choice."""
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    files = (path for folder in folders for path in (folder / group).glob("*.yaml"))
    return sorted({path.stem for path in files if not path.stem.startswith("_")})


def compose(
    root: str, overrides: Sequence[str] = (), *, config_dir: str | Path | None = None
) -> DictConfig:
    """The configuration a command would run with, for tests and notebooks.

    Args:
        root: a file of `conf/` such as "train" or "eval".
        overrides: `name=value` in Hydra's own syntax.
        config_dir: a user's folder, whose names win over the packaged ones.
    """
    with _COMPOSING:
        folder = str(conf_dir())
        with (
            user_recipes(config_dir),
            _beside_an_application(),
            hydra.initialize_config_dir(folder, version_base="1.3"),
        ):
            cfg = hydra.compose(root, list(overrides), return_hydra_config=True)
        with _hydra_config(cfg), open_dict(cfg):
            pin(cfg)
            del cfg["hydra"]
    return cfg


@contextmanager
def _beside_an_application() -> Iterator[None]:
    """Leave to compose while a Hydra application runs, such as our commands or a user's own."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        # Asked again: Hydra puts another instance in its place.
        GlobalHydra.instance().hydra = running


@contextmanager
def user_recipes(config_dir: str | Path | None) -> Iterator[None]:
    """Makes the names of a user's folder win over the packaged ones; Hydra's own --config-dir loses."""
    Plugins.instance().register(_UserRecipes)
    _UserRecipes.folder = None if config_dir is None else str(Path(config_dir).resolve())
    try:
        yield
    finally:
        _UserRecipes.folder = None


class _UserRecipes(SearchPathPlugin):
    folder: ClassVar[str | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.prepend(provider="user", path=f"file://{self.folder}", anchor="main")


def pin(cfg: DictConfig) -> None:
    """Replaces the recipe's name, which only a Hydra application knows, by its value."""
    if "experiment_name" in cfg:
        cfg.experiment_name = cfg.experiment_name


def instantiate(node: Any, **kwargs: Any) -> Any:
    """Builds what a node describes (`_target_` and its arguments); plain dicts and lists all through."""
    return hydra.utils.instantiate(node, _convert_="all", **kwargs)


def check_complete(cfg: DictConfig) -> None:
    """Names every value that only the user can give, where it was not given.

    Raises:
        ValueError: at least one is missing.
    """
    if missing := [name for name, value in _named_values(cfg) if value == "???"]:
        raise ValueError(
            f"no value for {', '.join(missing)}; say {' '.join(f'{k}=...' for k in missing)}"
        )


def given(node: Any) -> dict[str, Any]:
    """A node as plain dicts without what is null, at any depth."""
    items = plain(node, resolve=True) if isinstance(node, DictConfig) else node
    values = {k: given(v) if isinstance(v, dict) else v for k, v in items.items()}
    return {key: value for key, value in values.items() if value is not None}


def replace_node(cfg: DictConfig, name: str, node: Mapping[str, Any]) -> None:
    """Puts another node in the place of one."""
    with open_dict(cfg):
        cfg[name] = node


def plain(node: Any, *, resolve: bool) -> dict[str, Any]:
    """A node as plain dicts, lists and values; with `resolve`, interpolations are replaced."""
    container = OmegaConf.to_container(node, resolve=resolve, throw_on_missing=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def merged(node: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with others in the place of some, at any depth."""
    return plain(OmegaConf.merge(dict(node), dict(changes)), resolve=True)


def plain_value(value: Any) -> Any:
    """A value or a list as plain Python."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def dotted_keys(node: Any) -> list[str]:
    """Every name a user can override, as `optim.lr`, nodes and leaves alike."""
    return [name for name, _ in _named_values(node)]


def _named_values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nodes and leaves by dotted name, interpolations as they stand."""
    items = plain(node, resolve=False) if isinstance(node, DictConfig) else node
    for key, value in items.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _named_values(value, f"{prefix}{key}.")


def data_root() -> str:
    """Where the named data sets lie: SAM_TRAIN_DATA, else ../shared/data where that exists, else data."""
    if named := os.environ.get("SAM_TRAIN_DATA"):
        return named
    for base in (PACKAGE_DIR.parent, Path.cwd()):
        shared = base.parent / "shared" / "data"
        if shared.is_dir():
            return str(shared)
    return "data"


def has_wandb_key() -> bool:
    """Whether Weights & Biases could log in: a key in the environment or a login kept in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return re.search(r"machine\s+\S*wandb", netrc.read_text()) is not None
    except OSError:
        return False


def _chosen(group: str, default: str) -> str:
    """The option picked for a group, where a Hydra application is running."""
    if not HydraConfig.initialized():
        return default
    return HydraConfig.get().runtime.choices.get(group) or default


@contextmanager
def _hydra_config(cfg: DictConfig) -> Iterator[None]:
    holder = HydraConfig.instance()
    before = holder.cfg
    holder.set_config(cfg)
    try:
        yield
    finally:
        holder.cfg = before


def _folder_name(text: str) -> str:
    """A text such as `optim.lr=0.1,data.path=/a/b` as the name of one folder."""
    name = re.sub(r"[^\w.=,+-]+", "_", text)
    return name if len(name) <= 200 else f"{name[:180]}-{zlib.crc32(text.encode()):08x}"


def _each_set(part: str, *, _root_: DictConfig, _parent_: DictConfig) -> DictConfig:
    """The `train` or `val` node of every set of a mixture, by name."""
    sets = _root_.data.sets
    for name in sets:
        if "sets" in sets[name]:
            raise ValueError(f"data.sets.{name} is a mixture itself: name its sets one by one")
    nodes = {name: f"${{data.sets.{name}.{part}}}" for name in sets}
    return DictConfig(nodes, parent=_parent_)


def _low_res_size(image_encoder: DictConfig) -> int:
    """Side of the masks a model predicts: the decoder upscales its embedding four times."""
    stride = image_encoder.get("stride") or image_encoder.get("patch_size") or 16
    return 4 * int(image_encoder.img_size) // int(stride)


OmegaConf.register_new_resolver("low_res_size", _low_res_size, replace=True)
OmegaConf.register_new_resolver("each_set", _each_set, replace=True)
OmegaConf.register_new_resolver("folder_name", _folder_name, replace=True)
OmegaConf.register_new_resolver("chosen", _chosen, replace=True)
OmegaConf.register_new_resolver("data_root", data_root, replace=True)
OmegaConf.register_new_resolver("has_wandb_key", has_wandb_key, replace=True)
OmegaConf.register_new_resolver("not", lambda value: not value, replace=True)
