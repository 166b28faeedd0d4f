"""Tells checkpoint formats apart and reads each into one record: our names, and the model they fit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sam_train.checkpoints.files import (
    READABLE,
    WEIGHT_SUFFIXES,
    CheckpointError,
    load_torch_file,
)
from sam_train.checkpoints.hugging_face import (
    download,
    load_pixel_statistics,
    load_settings,
    load_tensors,
    weight_files,
)
from sam_train.checkpoints.sam_keys import (
    MOBILE_SAM,
    OFFICIAL_VIT,
    SAM_TRAIN,
    KeyTable,
    hugging_face,
)
from sam_train.checkpoints.sam_sizes import SamSizes

RECORD_KEY = "sam_train"
"""The key under which our `.ckpt` files say which model they hold."""
DETECTOR_KEY = "detector"
"""Within that record, the description of a box detector in the place of a model's."""
FORMAT_VERSION = 1

BUILT_IN = {"sam_tiny": Path(__file__).parents[1] / "weights" / "sam_tiny.ckpt"}
"""Weights that travel inside the package, by the name that stands for their path."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, whatever its format.

    Attributes:
        path: where it came from, for messages.
        table: names of its format.
        config: plain dict of the model's config node.
        tensors: by our names.
        unexpected: names of tensors that no model of this format has.
    """

    path: str
    table: KeyTable
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    unexpected: tuple[str, ...]

    def stored_name(self, name: str) -> str:
        """What our tensor is called in the file."""
        return self.table.theirs(name) or name


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint of any format onto the CPU.

    Args:
        path: an official `.pth` (SAM, MedSAM, MobileSAM), a Hugging Face folder or hub name, our
            `.ckpt`, or a name of `BUILT_IN`, which a file or folder of the same name goes before.

    Raises:
        FileNotFoundError: there is no such file; the message names near ones.
        CheckpointError: it is there, but no checkpoint, damaged, or of an unknown kind.
    """
    place = Path(path).expanduser()
    if str(path) in BUILT_IN and not place.exists():
        place = BUILT_IN[str(path)]
    if place.is_dir():
        return _read_hugging_face(place, weight_files(place))
    if place.is_file() and place.suffix == ".safetensors":
        return _read_hugging_face(place.parent, [place])
    if place.is_file():
        return _read_torch_file(place)
    if _is_hub_name(str(path)):
        folder = download(str(path))
        return _read_hugging_face(folder, weight_files(folder))
    raise FileNotFoundError(f"no such checkpoint: {path}; {_near(place)}")


def checkpoint_payload(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a training checkpoint stores under `RECORD_KEY`, so that `load_model` can rebuild its model.

    Args:
        model_config: plain dict of the model's config node, interpolations resolved.
    """
    return {"format": FORMAT_VERSION, "model": dict(model_config)}


def _is_hub_name(name: str) -> bool:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return False
    return Path(name).suffix not in WEIGHT_SUFFIXES and not Path(name).parent.exists()


def _near(place: Path) -> str:
    folder = place.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(place.name, names, n=3, cutoff=0.5)
    close = close or [name for name in names if Path(name).suffix in WEIGHT_SUFFIXES][:5]
    if not close:
        return f"{folder} holds no checkpoint; {READABLE}"
    return f"did you mean {', '.join(str(folder / name) for name in close)}?"


def _read_torch_file(path: Path) -> Checkpoint:
    content = load_torch_file(path)
    if RECORD_KEY in content:
        return _read_own(path, content)
    if "pytorch-lightning_version" in content:
        raise CheckpointError(
            f"{path} is a Lightning checkpoint without the record {RECORD_KEY!r} that says which model "
            "it holds; only those written by sam-train can be rebuilt"
        )
    # Published training scripts, MedSAM's for one, store the weights beside the optimiser's state.
    weights = content.get("model", content)
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError(f"{path} holds {_first(content)}, not tensors by name; {READABLE}")
    if any(name.startswith("image_encoder.layers.0.") for name in weights):
        return _checkpoint(path, MOBILE_SAM, weights)
    if any(name.startswith("image_encoder.blocks.0.") for name in weights):
        return _checkpoint(path, OFFICIAL_VIT, weights)
    if any(name.startswith("vision_encoder.layers.0.") for name in weights):
        raise CheckpointError(
            f"{path} holds the weights of a Hugging Face SamModel: give its folder, config.json included"
        )
    if any(name.startswith("image_encoder.trunk.") for name in weights):
        raise CheckpointError(f"{path} is a SAM 2 checkpoint, which is not read here; {READABLE}")
    raise CheckpointError(f"{path} is no SAM: it holds {_first(weights)}; {READABLE}")


def _read_own(path: Path, content: dict[str, Any]) -> Checkpoint:
    record, state = content[RECORD_KEY], content.get("state_dict")
    if not isinstance(record, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f"{path} is damaged: its record {RECORD_KEY!r} or state_dict is no dict"
        )
    if DETECTOR_KEY in record:
        raise CheckpointError(
            f"{path} holds a box detector, not a Sam: load_detector reads it, and the Sam below it has a "
            "checkpoint of its own"
        )
    if record.get("format") != FORMAT_VERSION or not isinstance(record.get("model"), dict):
        raise CheckpointError(
            f"{path}: expected a model in format {FORMAT_VERSION}, got format {record.get('format')}: "
            "another version of sam_train wrote it"
        )
    weights = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    return _checkpoint(path, SAM_TRAIN, weights, record["model"])


def _read_hugging_face(folder: Path, files: list[Path]) -> Checkpoint:
    settings = load_settings(folder)
    stored = load_tensors(files)
    inner = "mask_decoder.iou_prediction_head.layers."
    num_inner = len({name.split(".")[3] for name in stored if name.startswith(inner)})
    checkpoint = _checkpoint(folder, hugging_face(iou_head_depth=num_inner + 2), stored)
    checkpoint.config["mask_decoder"]["transformer"].update(settings)
    checkpoint.config.update(load_pixel_statistics(folder))
    return checkpoint


def _checkpoint(
    path: Path,
    table: KeyTable,
    stored: Mapping[str, Tensor],
    config: dict[str, Any] | None = None,
) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in stored.items():
        first = table.copies.get(name, name)
        if name in table.left_out or (first != name and first in stored):
            continue
        if ours := table.ours(first):
            tensors[ours] = tensor
        else:
            unexpected.append(name)
    config = config or SamSizes(str(path), table, tensors).config()
    return Checkpoint(str(path), table, config, tensors, tuple(unexpected))


def _first(content: Mapping[Any, Any]) -> str:
    if not content:
        return "nothing"
    names = [str(key) for key in content]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
