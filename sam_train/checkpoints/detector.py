"""Box detectors in files: what a training writes, what others read, and what one starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_train.checkpoints.build import build_part, model_class
from sam_train.checkpoints.files import CheckpointError, load_torch_file
from sam_train.checkpoints.formats import DETECTOR_KEY, FORMAT_VERSION, RECORD_KEY
from sam_train.checkpoints.load import load_encoder
from sam_train.models.box_detector import BoxDetector, EncoderBoxDetector
from sam_train.models.fingerprint import encoder_id
from sam_train.models.sam import Sam

log = logging.getLogger(__name__)

ENCODER = "image_encoder."
BY_CLASS = "roi_heads.box_predictor."
"""Weights that a detector of other classes has in other numbers."""


def detector_encoder(detector: BoxDetector) -> str:
    """The fingerprint of the image encoder below a detector, "" for one that has none."""
    return encoder_id(detector) if isinstance(detector, EncoderBoxDetector) else ""


def detector_payload(config: Mapping[str, Any], encoder: str) -> dict[str, Any]:
    """What a training checkpoint stores under `RECORD_KEY`, so that `load_detector` can rebuild it.

    Args:
        config: plain dict of the detector's config node, interpolations resolved.
        encoder: from `detector_encoder`.
    """
    return {"format": FORMAT_VERSION, DETECTOR_KEY: dict(config), "encoder": encoder}


def load_detector(
    path: str | Path, device: str | torch.device = "cpu", *, sam: Sam | None = None
) -> BoxDetector:
    """Reads a detector that sam-train wrote, in eval mode; the file is all that it needs.

    Args:
        path: a `.ckpt` of `sam-train experiment=detector`.
        device: where it is put; with `sam`, its device.
        sam: the model whose embeddings the detector is to read. Its image encoder is used, and no second
            one built. A detector that has no encoder of a Sam looks at images by itself and takes any.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no detector, damaged, or was trained on another image encoder than `sam`'s.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no such detector: {path}; expected a .ckpt of sam-train experiment=detector"
        )
    record, state = _content(path)
    if sam is not None and record["encoder"] and encoder_id(sam) != record["encoder"]:
        raise CheckpointError(
            f"{path} was trained on another image encoder than that of the given model: train one on it "
            "with sam-train experiment=detector checkpoint=MODEL, or give the model that it was trained on"
        )
    detector = _built(path, record[DETECTOR_KEY], sam)
    shares = sam is not None and isinstance(detector, EncoderBoxDetector)
    _fill(path, detector, state, left_out=ENCODER if shares else None)
    if not shares and detector_encoder(detector) != record["encoder"]:
        raise CheckpointError(
            f"{path} is damaged: its image encoder is not the one that its record names; copy it again"
        )
    place = sam.device if shares and sam is not None else device
    return detector.to(place).eval()


def start_detector(detector: BoxDetector, path: str) -> None:
    """Puts what a training starts from into a detector.

    Args:
        detector: on a Sam's encoder, or torchvision's.
        path: of the Sam, in any format that `load_model` takes; or a file of torchvision's weights, of
            which those that count classes are left out.

    Raises:
        CheckpointError: it does not fit.
    """
    if isinstance(detector, EncoderBoxDetector):
        load_encoder(detector, path)
        return
    stored = load_torch_file(Path(path).expanduser())
    classes = [name for name in stored if str(name).startswith(BY_CLASS)]
    if classes:
        log.info("%s: %d weights for its classes are left out", path, len(classes))
    given = {name: tensor for name, tensor in stored.items() if name not in classes}
    _fill(Path(path), detector, given, left_out=BY_CLASS)


def _content(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = load_torch_file(path)
    record, state = content.get(RECORD_KEY), content.get("state_dict")
    if not isinstance(record, dict) or DETECTOR_KEY not in record:
        raise CheckpointError(
            f"{path} holds no box detector; expected a .ckpt of sam-train experiment=detector"
        )
    if record.get("format") != FORMAT_VERSION or not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: expected a detector in format {FORMAT_VERSION}, got format {record.get('format')}: "
            "another version of sam_train wrote it"
        )
    prefix = "model."
    return record, {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _built(path: Path, node: Mapping[str, Any], sam: Sam | None) -> BoxDetector:
    try:
        if sam is not None and "sam" in node:
            rest = {name: value for name, value in node.items() if name not in ("_target_", "sam")}
            detector = model_class(node.get("_target_"))(sam=sam, **build_part(rest))
        else:
            detector = build_part(node)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(detector, BoxDetector):
        raise CheckpointError(f"{path} describes a {type(detector).__name__}, not a box detector")
    return detector


def _fill(
    path: Path, detector: BoxDetector, state: Mapping[str, Tensor], *, left_out: str | None
) -> None:
    """Puts weights into a detector, all but those whose names begin with `left_out`."""

    def wanted(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in named.items() if left_out is None or not k.startswith(left_out)}

    expected, given = wanted(detector.state_dict()), wanted(state)
    misfits = sorted(
        name
        for name in expected.keys() | given.keys()
        if name not in given or name not in expected or given[name].shape != expected[name].shape
    )
    if misfits:
        more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise CheckpointError(f"{path} does not fit the detector: {misfits[0]}{more} differ")
    detector.load_state_dict(given, strict=False)
