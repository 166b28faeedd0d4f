"""The engine's configuration: `conf/engine.yaml` with its groups, kept in ROOT/engine.yaml from `init` on.

It is kept with its interpolations, so that the folder may move, and may be edited by hand between two
rounds. What is said on the command line of a later verb counts for that call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data_engine.plan import explained
from sam_train import cli_errors, config
from sam_train.data.tar_samples import local_path
from sam_train.ops.files import write_atomically

FILE = "engine.yaml"
OF_CALLS = tuple(
    "root images annotations held_out_annotations image reason who out of_round tune all worker num_workers "
    "promote_model".split()
)
"""What a call says, and the file does not keep."""
BY_CHOICE = frozenset({"annotator"})
"""Groups that have no node unless `init` or a call chose one."""
ESSENTIAL = ("plan", "store")
"""What the file must say: no default could be meant."""
PROMOTION = ("better", "always", "never")
TRUTHS = "data_engine.truth.Truths"
BUILT = ("store", "measure", "report", "audit", "training", "tuning")
"""Nodes that something is built from."""


Node = dict[str, Any]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class _Kinds(msgspec.Struct, kw_only=True):
    """What the values are; what a node holds is looked at where it is built."""

    plan: Node
    store: Node
    stages: dict[Literal["assisted", "semi_automatic", "automatic"], Node]
    preset: Node
    measure: Node
    report: Node
    audit: Node
    training: Node
    tuning: Node
    annotator: Node | None = None
    truth: Node | None = None
    config_dir: str | None = None
    held_out: Share
    copy: bool
    seed: int
    embeddings_ahead: bool
    device: str
    labels: list[str] | None = None
    lease_s: Annotated[float, msgspec.Meta(gt=0)]
    images_per_shard: Count
    promote: str
    promote_by: str
    worker: int
    num_workers: Count
    tune: bool


def check(values: Mapping[str, Any]) -> None:
    """Sees that values are of their kinds.

    Raises:
        ValueError: one is not; the message names it.
    """
    try:
        msgspec.convert(values, _Kinds)
    except msgspec.ValidationError as error:
        raise ValueError(explained(error)) from None
    if (rule := values["promote"]) not in PROMOTION:
        raise ValueError(f"promote is one of {', '.join(PROMOTION)}, got {rule}")
    for name in BUILT:
        if "_target_" not in values[name]:
            raise ValueError(f"{name} has no _target_: it says what is built")


def composed(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """What a command line alone gives."""
    return config.compose("engine", overrides, config_dir=config_dir)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """As plain values, interpolations replaced."""
    return config.plain(cfg, resolve=True)


def absolute(cfg: DictConfig, config_dir: str | None) -> None:
    """Makes what `init` was told the same from every folder: paths that later calls look at."""
    cfg.root = os.path.abspath(str(cfg.root))
    cfg.config_dir = None if config_dir is None else os.path.abspath(config_dir)
    apart = config.plain_value(cfg.held_out_images)
    cfg.held_out_images = [*map(_absolute, apart)] if isinstance(apart, list) else _absolute(apart)
    for step in [cfg.plan.get("defaults"), *(cfg.plan.get("steps") or ())]:
        for name in ("checkpoint", "detector_boxes"):
            if isinstance(step, DictConfig) and os.path.isfile(str(step.get(name))):
                step[name] = os.path.abspath(step[name])


def _absolute(place: str | None) -> str | None:
    local = None if place is None or "::" in place else local_path(place)
    return place if local is None else os.path.abspath(os.path.expanduser(local))


def write(root: Path, cfg: DictConfig) -> None:
    """Keeps a configuration in an engine's folder."""
    kept = {
        name: value
        for name, value in config.plain(cfg, resolve=False).items()
        if name not in OF_CALLS
    }
    write_atomically(root / FILE, yaml.safe_dump(kept, sort_keys=False))


def add_truth(root: Path, node: Mapping[str, Any] | None) -> None:
    """Lets an engine know more masks: `truth` of its file."""
    path = root / FILE
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = stored.get("truth")
    of = known["of"] if known and known["_target_"] == TRUTHS else [known] if known else []
    if node is not None and node not in of:
        # Shards have theirs beside the images, and lose it where only COCO files are asked.
        stored["truth"] = {"_target_": TRUTHS, "of": [*of, node]}
        write_atomically(path, yaml.safe_dump(stored, sort_keys=False))


def read(
    root: Path, overrides: Sequence[str] = (), config_dir: str | None = None
) -> dict[str, Any]:
    """An engine's configuration with a call's changes, as plain values.

    What the file does not say, as it is of an older version, is as `conf/engine.yaml` has it.

    Raises:
        FileNotFoundError: there is no engine.
        ValueError: its file cannot be read or has a name or a value that cannot be, or the call changes
            what it cannot.
    """
    path = root / FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        stored = OmegaConf.create(content if isinstance(content, dict) else {})
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{root} holds no engine (no {FILE}): data-engine init root={root} images=... "
            "checkpoint=... makes one, or goes on with making it"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no readable configuration: {reason}") from None
    if not stored:
        raise ValueError(f"{path} is no readable configuration: expected names and values")
    config_dir = config_dir or stored.get("config_dir")
    changes = composed(overrides, config_dir)
    if unknown := sorted(map(str, stored.keys() - changes.keys() - BY_CHOICE)):
        hint = cli_errors.near(unknown[0], map(str, changes), "setting")
        raise ValueError(f"{path}: there is no setting {unknown[0]}. {hint}")
    with open_dict(stored):
        for name, value in config.plain(changes, resolve=False).items():
            if name in OF_CALLS or name not in (*stored, *ESSENTIAL):
                stored[name] = value
        for override in overrides:
            name = override.partition("=")[0].lstrip("+~")
            _change(stored, changes, name, path)
        stored.root, stored.config_dir = os.path.abspath(root), config_dir
    try:
        values = resolved(stored)
        check(values)
    except (ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    return values


def _change(stored: DictConfig, changes: DictConfig, name: str, path: Path) -> None:
    if name in OF_CALLS:
        return
    if name == "plan":
        raise ValueError(f"the plan was chosen by init: edit plan.steps in {path}")
    group, _, package = name.partition("@")
    OmegaConf.update(stored, package or group, OmegaConf.select(changes, package or group))
