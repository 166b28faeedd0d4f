"""A new engine: its folder, its images and the model that it begins with. And more images, later."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from data_engine import settings
from data_engine.code_version import code_version
from data_engine.engine import SAM, Engine, only_one
from data_engine.image_copies import Copies, all_copies
from data_engine.image_finding import find_images
from data_engine.images import COPIES, Registration, register
from data_engine.measure import HELD_OUT
from data_engine.model_files import keep_sam
from data_engine.plan import read_steps
from data_engine.plan_check import check_steps
from data_engine.records import Image, Model, Rle
from data_engine.truth import Truths, UnknownTruthError
from sam_train import config
from sam_train.ops.files import write_atomically

log = logging.getLogger(__name__)

FIRST_MODEL = Path("models") / "first.ckpt"
BEGUN = "init.yaml"
"""What an `init` under way was told, until `engine.yaml` is there."""
LEFTOVERS = ("models", COPIES, BEGUN)
LEFT_WITH_SUFFIX = ("engine.sqlite", f".{settings.FILE}.", f".{BEGUN}.", ".lock")
"""What an `init` that was broken off may have left, and how names of more such begin."""
COCO_TRUTH = "data_engine.truth.CocoTruth"
LOOKED_AT = 20
"""Held-out images of which one should have masks."""


def found(overrides: Sequence[str], config_dir: str | None = None) -> Engine:
    """Makes an engine, or finishes one whose `init` was broken off.

    Args:
        overrides: `name=value` for `conf/engine.yaml`.
        config_dir: a user's own recipes.

    Raises:
        ValueError: the folder holds an engine or something else, the store is another engine's, a value
            is missing or wrong, or there is no image.
        FileNotFoundError: there are no such images, or there is no such checkpoint.
        StoreError: the store cannot be made.
    """
    cfg = settings.composed(overrides, config_dir)
    config.check_complete(cfg)
    if cfg.images is None:
        raise ValueError("no value for images; say images=... (a folder, a glob or shards)")
    settings.absolute(cfg, config_dir)
    cfg.truth = cfg.truth or truth_node(settings.resolved(cfg))
    chosen = settings.resolved(cfg)
    settings.check(chosen)
    check_steps(read_steps(chosen["plan"]), chosen)
    root = Path(cfg.root)
    _check_free(root)
    with only_one(root):
        _check_free(root)
        return _made(root, cfg, chosen)


def _made(root: Path, cfg: DictConfig, chosen: Mapping[str, Any]) -> Engine:
    told = {"kind": SAM, "checkpoint": str(chosen["checkpoint"])}
    lineage = {"config": told, "code_version": code_version()}
    first = keep_sam(_place(chosen["checkpoint"]), root / FIRST_MODEL, lineage)
    engine = Engine(root, chosen, config.instantiate(chosen["store"], create=True))
    _begin(engine)
    add_images(engine, chosen)
    if not engine.store.num_images(held_out=False):
        raise ValueError(f"images={cfg.images} gives no image to label: all are broken or held out")
    _look_at_truth(engine)
    engine.store.put_model(
        Model(
            id=first,
            path=FIRST_MODEL.as_posix(),
            config=told,
            code_version=code_version(),
            promoted=True,
            created_at=engine.clock(),
        )
    )
    settings.write(root, cfg)
    (root / BEGUN).unlink()
    return engine


def _begin(engine: Engine) -> None:
    """Goes on with the same `init`; of another one that was given up nothing stays."""
    path, store = engine.root / BEGUN, engine.store
    told = yaml.safe_dump(dict(engine.settings), sort_keys=False)
    if not path.exists() and (store.num_images() or store.models() or store.rounds()):
        raise ValueError(
            f"{store.name} is the store of another engine, or of this one and its {settings.FILE} is gone: "
            "put that back, or choose another root=DIR and an empty store"
        )
    if path.exists() and path.read_text(encoding="utf-8") != told:
        store.forget_images()
        for copy in all_copies(engine.root):
            shutil.rmtree(copy)
    write_atomically(path, told)


def _look_at_truth(engine: Engine) -> None:
    """Says where models will be measured on nothing."""
    said = []
    for image in islice(engine.store.images(held_out=True), LOOKED_AT):
        try:
            if engine.truth(image):
                return
        except UnknownTruthError as error:
            said.append(str(error))
    if said:
        log.warning(
            "no masks are known of the images that are held out, so no model can be measured and each one "
            "is taken as better: say held_out_images=SHARDS, annotations=FILE, or held_out=0 to have all "
            "labelled (%s)",
            said[0],
        )


def truth_node(call: Mapping[str, Any]) -> dict[str, Any] | None:
    """What knows the masks of images that COCO files are named of; None where none is."""
    names = (("images", "annotations"), ("held_out_images", "held_out_annotations"))
    nodes = [
        {
            "_target_": COCO_TRUTH,
            "images": os.path.abspath(str(call[images])),
            "annotations": os.path.abspath(str(call[annotations])),
        }
        for images, annotations in names
        if call[annotations] is not None
    ]
    if len(nodes) < 2:
        return nodes[0] if nodes else None
    return {"_target_": settings.TRUTHS, "of": nodes}


def add_images(engine: Engine, call: Mapping[str, Any]) -> Registration:
    """Registers images; a share of them, or those of a place of their own, are held out.

    Args:
        engine: see there.
        call: `images`, `annotations`, `held_out`, `held_out_images`, `held_out_annotations` and `copy`.
    """
    apart, share = call["held_out_images"], float(call["held_out"])
    copies = Copies(root=engine.root, truth=_truth(engine, call)) if call["copy"] else None
    if apart is not None:
        found = find_images(apart, call["held_out_annotations"])
        register(engine.store, found, held_out=1.0, copies=copies, clock=engine.clock)
        share = 0.0
    return register(
        engine.store,
        find_images(call["images"], call["annotations"]),
        held_out=share,
        copies=copies,
        clock=engine.clock,
    )


def _truth(engine: Engine, call: Mapping[str, Any]) -> Callable[[Image], Sequence[Rle]]:
    """What knows the masks of the images of a call: those of a COCO file that it names, too."""
    node = truth_node(call)
    if node is None:
        return engine.truth
    return Truths(of=[config.instantiate(node), engine.truth])


def add_more_images(engine: Engine) -> Registration:
    """The same later, where `images` and `annotations` are those of the call.

    Masks of a COCO file are known from then on, by engine.yaml. Once a model was measured, those held out stay
    what they are, or no two models could be compared: all new images are to be labelled.
    """
    call = {**engine.settings, "held_out_annotations": None}
    if (engine.root / HELD_OUT).is_dir():
        call |= {"held_out": 0.0, "held_out_images": None}
        log.info("models were measured already: none of these is held out")
    done = add_images(engine, call)
    settings.add_truth(engine.root, truth_node(call))
    return done


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
    if any(not name.startswith(LEFT_WITH_SUFFIX) for name in names.difference(LEFTOVERS)):
        raise ValueError(f"{root} holds other things: choose another root=DIR")


def _place(checkpoint: str) -> str:
    return os.path.expanduser(str(checkpoint))
