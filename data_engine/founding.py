"""A new engine: its folder, its images and the model that it begins with. And more images, later."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_engine import settings
from data_engine.code_version import code_version
from data_engine.engine import SAM, Engine
from data_engine.image_finding import find_images
from data_engine.images import Registration, register
from data_engine.model_files import keep_sam
from data_engine.plan import read_steps
from data_engine.records import Model
from sam_train import config

log = logging.getLogger(__name__)

FIRST_MODEL = Path("models") / "first.ckpt"
LEFTOVERS = {"models", "engine.sqlite", "engine.sqlite-wal", "engine.sqlite-shm"}
"""What an `init` that was broken off may have left."""


def found(overrides: Sequence[str], config_dir: str | None = None) -> Engine:
    """Makes an engine, or finishes one whose `init` was broken off.

    Args:
        overrides: `name=value` for `conf/engine.yaml`.
        config_dir: a user's own recipes.

    Raises:
        ValueError: the folder holds an engine or something else, a value is missing or wrong, or there
            is no image.
        FileNotFoundError: there are no such images, or there is no such checkpoint.
        StoreError: the store cannot be made.
    """
    cfg = settings.composed(overrides, config_dir)
    config.check_complete(cfg)
    if cfg.images is None:
        raise ValueError("no value for images; say images=... (a folder, a glob or shards)")
    root = Path(os.path.abspath(str(cfg.root)))
    cfg.root = str(root)
    if cfg.annotations is not None and cfg.truth is None:
        cfg.truth = {
            "_target_": "data_engine.truth.CocoTruth",
            "images": os.path.abspath(str(cfg.images)),
            "annotations": os.path.abspath(str(cfg.annotations)),
        }
    chosen = settings.resolved(cfg)
    read_steps(chosen["plan"])
    _check_free(root)
    first = keep_sam(_place(chosen["checkpoint"]), root / FIRST_MODEL)
    engine = Engine(root, chosen, config.instantiate(chosen["store"], create=True))
    add_images(engine, chosen)
    if not engine.store.num_images(held_out=False):
        raise ValueError(f"images={cfg.images} gives no image to label: all are broken or held out")
    engine.store.put_model(
        Model(
            id=first,
            path=FIRST_MODEL.as_posix(),
            config={"kind": SAM},
            code_version=code_version(),
            promoted=True,
            created_at=engine.clock(),
        )
    )
    settings.write(root, cfg)
    return engine


def add_images(engine: Engine, call: Mapping[str, Any]) -> Registration:
    """Registers images; a share of them, or those of a place of their own, are held out.

    Args:
        engine: see there.
        call: `images`, `annotations`, `held_out` and `held_out_images`.
    """
    apart, share = call["held_out_images"], float(call["held_out"])
    if apart is not None:
        register(engine.store, find_images(apart), held_out=1.0, clock=engine.clock)
        share = 0.0
    return register(
        engine.store,
        find_images(call["images"], call["annotations"]),
        held_out=share,
        clock=engine.clock,
    )


def _check_free(root: Path) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise ValueError(f"root={root} is a file, expected a folder or a name that is free")
    names = {path.name for path in root.iterdir()}
    if settings.FILE in names:
        raise ValueError(
            f"{root} holds an engine already: data-engine round root={root} goes on with it, "
            f"data-engine register root={root} images=... adds images, another root=DIR begins anew"
        )
    if names - LEFTOVERS:
        raise ValueError(f"{root} holds other things: choose another root=DIR")


def _place(checkpoint: str) -> str:
    return os.path.expanduser(str(checkpoint))
