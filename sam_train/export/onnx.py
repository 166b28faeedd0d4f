"""Two ONNX files, encoder and decoder, checked in onnxruntime before anyone sees them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sam_train.export import onnx_check, onnx_weights
from sam_train.export.onnx_modules import OnnxDecoder, OnnxEncoder, traceable
from sam_train.models.sam import Sam

PACKAGES = ("onnx", "onnxruntime")
MOST_BYTES = 2_000_000_000
"""Of one ONNX file, a protocol buffer."""
SMALLER = {"float16": onnx_weights.halve, "int8": onnx_weights.quantise}


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """Writes encoder.onnx and decoder.onnx.

    Args:
        opset: of the files.
        encoder: the encoder's file too; else the decoder's alone, as in the published notebook.
        return_single_mask: the decoder chooses one mask; else it gives all, the single one first.
        smaller: float16 or int8 for one more decoder file, with weights of half or a quarter of the size.
        tolerance: the largest difference from the model, relative to its largest number, that is let pass;
            the smaller decoder's is told, whatever it is.
    """

    is_folder: ClassVar[bool] = True
    owned: ClassVar[tuple[str, ...]] = (
        "encoder.onnx",
        *(f"decoder.{name}.onnx" for name in SMALLER),
    )
    opset: int = 17
    encoder: bool = True
    return_single_mask: bool = True
    smaller: str | None = None
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.smaller is not None and self.smaller not in SMALLER:
            raise ValueError(f"smaller is one of {', '.join(SMALLER)} or null, got {self.smaller}")
        if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
            raise ImportError(
                f"format=onnx needs {' and '.join(missing)}: pip install 'sam-train[export]'"
            )

    def write(self, model: Sam, out: Path) -> list[str]:
        """Writes the files and returns a report, a line each.

        Raises:
            ValueError: the exporter cannot express the model, or onnxruntime answers otherwise.
        """
        if self.encoder:
            _check_size(model)
        out.mkdir()
        traced = traceable(model)
        lines = [
            f"opset {self.opset}; differences from the model in onnxruntime, relative to its largest number:"
        ]
        with torch.no_grad():
            if self.encoder:
                lines.append(self._write_encoder(model, traced, out / "encoder.onnx"))
            lines += self._write_decoder(model, traced, out / "decoder.onnx")
        return lines

    def _write_encoder(self, model: Sam, traced: Sam, path: Path) -> str:
        image = {OnnxEncoder.INPUTS[0]: torch.zeros(_image_shape(traced))}
        self._write_file(OnnxEncoder(traced), image, {"image": {2: "height", 3: "width"}}, path)
        found = onnx_check.encoder_difference(model, path)
        self._refuse_if_wrong(path.name, found)
        return _line(path, found)

    def _write_decoder(self, model: Sam, traced: Sam, path: Path) -> list[str]:
        module = OnnxDecoder(traced, return_single_mask=self.return_single_mask)
        axes = {name: {1: "num_points"} for name in ("point_coords", "point_labels")}
        self._write_file(module, example_inputs(traced), axes, path)
        found, _ = self._decoder_difference(model, path)
        self._refuse_if_wrong(path.name, found)
        lines = [_line(path, found)]
        if self.smaller is not None:
            small = path.with_suffix(f".{self.smaller}.onnx")
            SMALLER[self.smaller](path, small)
            found, changed = self._decoder_difference(model, small)
            lines.append(f"{_line(small, found)}; {changed:.2%} of the pixels change sides")
        return lines

    def _write_file(
        self,
        module: OnnxEncoder | OnnxDecoder,
        inputs: Mapping[str, Tensor],
        dynamic_axes: Mapping[str, Mapping[int, str]],
        path: Path,
    ) -> None:
        """One module to one file."""
        try:
            with warnings.catch_warnings():
                # Sizes that it takes for constants, which they are; what is not shows in the check.
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    module,
                    tuple(inputs.values()),
                    path,
                    input_names=list(module.INPUTS),
                    output_names=list(module.OUTPUTS),
                    dynamic_axes=dynamic_axes,
                    opset_version=self.opset,
                    # The exporter by torch.export has no three-dimensional attention, which the windows
                    # of SAM's ViT are (torch 2.15).
                    dynamo=False,
                )
        except (torch.onnx.OnnxExporterError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"torch.onnx cannot write {path.name} in opset {self.opset}: {str(error).splitlines()[0]}"
            ) from error

    def _decoder_difference(self, model: Sam, path: Path) -> tuple[onnx_check.Difference, float]:
        return onnx_check.decoder_difference(
            model, path, return_single_mask=self.return_single_mask
        )

    def _refuse_if_wrong(self, name: str, found: onnx_check.Difference) -> None:
        if not found.largest <= self.tolerance:
            raise ValueError(
                f"{name}: onnxruntime differs from the model by {found}, more than the tolerance of "
                f"{self.tolerance}; nothing was written"
            )


def example_inputs(model: Sam) -> dict[str, Tensor]:
    """Inputs of the decoder, by name, to trace it with."""
    case = next(onnx_check.cases(model, seed=0))
    embeddings = model.image_encoder(model.preprocess(torch.zeros(_image_shape(model))))
    return case.inputs(embeddings)


def _check_size(model: Sam) -> None:
    weights = model.image_encoder.state_dict().values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    if size > MOST_BYTES:
        raise ValueError(
            f"the encoder's {size / 1e9:.1f} GB are more than the {MOST_BYTES / 1e9:.0f} GB that one ONNX "
            "file holds: format.encoder=false writes the decoder alone"
        )


def _image_shape(model: Sam) -> tuple[int, int, int, int]:
    side = model.image_encoder.img_size
    # Neither side whole, so that padding is traced on both.
    return (1, model.image_encoder.in_chans, side * 7 // 8, side * 3 // 4)


def _line(path: Path, found: onnx_check.Difference) -> str:
    return f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {found}"
