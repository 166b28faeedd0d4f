"""Whether onnxruntime answers with the exported files as the model does, on prompts of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.export.onnx_modules import MOST_POINTS_FOR_CANDIDATES, OnnxDecoder, OnnxEncoder
from sam_train.models.sam import Sam
from sam_train.ops.coords import preprocess_shape
from sam_train.structures import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    PADDING,
    ImageFeatures,
    Prompts,
)

CLICKS = (1, 2, 5, 16, 64)
"""Of one prompt, tried with a padding point after them and with a box in its place."""
ASPECTS = ((1.0, 1.0), (0.75, 1.0), (1.0, 0.4), (0.3, 1.0))
"""Heights and widths of the pictures tried, in shares of the longest side."""


class Difference(NamedTuple):
    """How far onnxruntime's answers are from the model's.

    Attributes:
        largest: of any number, relative to the largest number expected, or to 1 where all are smaller.
        where: the input it was seen on.
    """

    largest: float
    where: str

    def __str__(self) -> str:
        return f"{self.largest:.1e} at {self.where}"


@dataclass(frozen=True)
class Case:
    """One prompt for the decoder.

    Attributes:
        coords: (1, N, 2) model input frame.
        labels: (1, N).
        mask_input: (1, 1, 4h, 4w) logits.
        has_mask: whether the mask counts.
        original_size: (H, W).
    """

    coords: Tensor
    labels: Tensor
    mask_input: Tensor
    has_mask: bool
    original_size: tuple[int, int]

    def __str__(self) -> str:
        mask = " and a mask" if self.has_mask else ""
        return f"{self.coords.shape[1]} points{mask}, {self.original_size[0]} x {self.original_size[1]} px"

    def inputs(self, image_embeddings: Tensor) -> dict[str, Tensor]:
        """By the decoder's names."""
        values = (
            image_embeddings,
            self.coords,
            self.labels.float(),
            self.mask_input,
            torch.tensor([float(self.has_mask)]),
            torch.tensor(self.original_size, dtype=torch.float32),
        )
        return dict(zip(OnnxDecoder.INPUTS, values, strict=True))


def session(path: Path) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(opened: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of a session."""
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return [torch.from_numpy(array) for array in opened.run(None, arrays)]


@torch.no_grad()
def encoder_difference(model: Sam, path: Path, seed: int = 0) -> Difference:
    """Compares the encoder on pictures of several shapes."""
    opened = session(path)
    worst = Difference(-1.0, "")
    for image in _images(model, seed):
        expected = model.image_encoder(model.preprocess(image))
        (got,) = run(opened, {OnnxEncoder.INPUTS[0]: image})
        where = f"a picture of {image.shape[2]} x {image.shape[3]} px"
        worst = max(worst, Difference(_difference([got], [expected]), where))
    return worst


@torch.no_grad()
def decoder_difference(
    model: Sam, path: Path, *, return_single_mask: bool, seed: int = 0
) -> tuple[Difference, float]:
    """Compares the decoder on prompts of every kind, and tells which share of the pixels changes sides.

    What is expected comes from `Sam.decode`, as training and evaluation call it, and not from the module
    that was exported.
    """
    opened = session(path)
    worst, changed, pixels = Difference(-1.0, ""), 0, 0
    image = next(_images(model, seed))
    image_embeddings = model.image_encoder(model.preprocess(image))
    for case in cases(model, seed):
        expected = answer(model, image_embeddings, case, return_single_mask=return_single_mask)
        got = run(opened, case.inputs(image_embeddings))
        worst = max(worst, Difference(_difference(got, expected), str(case)))
        if got[0].shape == expected[0].shape:
            changed += int(((got[0] > 0) != (expected[0] > 0)).sum())
            pixels += expected[0].numel()
    return worst, changed / max(1, pixels)


def answer(
    model: Sam, image_embeddings: Tensor, case: Case, *, return_single_mask: bool
) -> list[Tensor]:
    """What the model answers, by the rule of the published ONNX form: masks, IoUs, low-resolution masks."""
    masks = case.mask_input if case.has_mask else None
    prompts = Prompts(case.coords, case.labels, masks)
    features = ImageFeatures(image_embeddings)
    one = model.decode(features, prompts, multimask_output=False)
    several = model.decode(features, prompts, multimask_output=True)
    if not return_single_mask:
        low_res_masks = torch.cat([one.low_res_masks, several.low_res_masks], dim=1)
        ious = torch.cat([one.iou_predictions, several.iou_predictions], dim=1)
    elif case.coords.shape[1] > MOST_POINTS_FOR_CANDIDATES:
        low_res_masks, ious = one
    else:
        best = int(several.iou_predictions.argmax())
        low_res_masks = several.low_res_masks[:, best : best + 1]
        ious = several.iou_predictions[:, best : best + 1]
    height, width = case.original_size
    input_size = preprocess_shape(height, width, model.image_encoder.img_size)
    full = model.postprocess_masks(low_res_masks, input_size, case.original_size)
    return [full, ious, low_res_masks]


def cases(model: Sam, seed: int) -> Iterator[Case]:
    """Clicks with a padding point or a box, each with and without a mask, on pictures of several shapes."""
    generator = torch.Generator().manual_seed(seed)
    side, low = model.image_encoder.img_size, model.low_res_size
    box = torch.tensor([[0.2, 0.3], [0.7, 0.8]]) * side
    for i, (num_clicks, has_box) in enumerate(
        [(0, True), *((n, b) for n in CLICKS for b in (False, True))]
    ):
        clicks = torch.rand(num_clicks, 2, generator=generator) * side
        labels = torch.randint(BACKGROUND, FOREGROUND + 1, (num_clicks,), generator=generator)
        more = [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT] if has_box else [PADDING]
        coords = torch.cat([clicks, box if has_box else torch.zeros(1, 2)])
        mask = F.interpolate(
            4 * torch.randn(1, 1, 8, 8, generator=generator), (low, low), mode="bilinear"
        )
        height, width = ASPECTS[i % len(ASPECTS)]
        for has_mask in (False, True):
            yield Case(
                coords[None],
                torch.cat([labels, torch.tensor(more)])[None],
                mask,
                has_mask,
                (round(1.5 * side * height), round(1.5 * side * width)),
            )


def _images(model: Sam, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side, channels = model.image_encoder.img_size, model.image_encoder.in_chans
    for height, width in ASPECTS:
        size = (round(side * height), round(side * width))
        coarse = torch.rand(1, channels, 8, 8, generator=generator)
        noise = torch.rand(1, channels, *size, generator=generator)
        yield 255 * (0.8 * F.interpolate(coarse, size, mode="bilinear") + 0.2 * noise)


def _difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    worst = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
            return float("inf")
        error = (ours - theirs).abs().max() / max(1.0, float(theirs.abs().max()))
        worst = max(worst, float(error))
    return worst
