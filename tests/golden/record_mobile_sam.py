"""Records what MobileSAM's published code answers, for the parity test of our TinyViT.

Its weights are a recipe, not a file: every tensor is drawn from its own name. To record again:

    git clone https://github.com/ChaoningZhang/MobileSAM
    python tests/golden/record_mobile_sam.py MobileSAM
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).with_name("mobile_sam.json")
NUM_SAMPLES = 48


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of mean 0 and variance 1 that depend on the name alone."""
    draws = np.random.default_rng(zlib.crc32(name.encode())).random(shape, dtype=np.float32)
    return (torch.tensor(draws) - 0.5) * 12**0.5


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that name: large enough everywhere that a mistake would show."""
    values = uniform(name, shape)
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    if name.endswith("running_var"):
        return (1 + 0.3 * values).clamp_min(0.1)
    if len(shape) == 1:
        return 1 + 0.2 * values if name.endswith("weight") else 0.2 * values
    owner = name.split(".")[-2]
    if name.endswith("attention_biases") or owner.endswith(("_token", "_tokens", "_embed")):
        return values
    fan_in = values[0].numel()
    return values * fan_in**-0.5


def image() -> Tensor:
    """(3, 768, 1024) pixels of 0 to 255: noise, coarse and fine; it needs padding at the bottom."""
    coarse = uniform("coarse image", (1, 3, 24, 32))
    smooth = torch.nn.functional.interpolate(coarse, (768, 1024), mode="bilinear")[0]
    return (128 + 50 * smooth + 10 * uniform("fine image", (3, 768, 1024))).clamp(0, 255)


def prompts() -> dict[str, Tensor]:
    """Two objects, each with a click of either label, in the model input frame."""
    return {
        "point_coords": torch.tensor(
            [[[300.0, 200.0], [700.0, 650.0]], [[512.0, 90.0], [8.0, 8.0]]]
        ),
        "point_labels": torch.tensor([[1, 0], [1, 1]]),
    }


def summary(values: Tensor) -> dict[str, Any]:
    """A tensor's shape, its scale, and numbers taken at even steps through it."""
    flat = values.detach().flatten().double()
    steps = torch.linspace(0, len(flat) - 1, min(NUM_SAMPLES, len(flat))).long()
    return {
        "shape": list(values.shape),
        "mean": flat.mean().item(),
        "abs_max": flat.abs().max().item(),
        "samples": [float(f"{x:.7g}") for x in flat[steps].tolist()],
    }


def answers(model: Any) -> dict[str, dict[str, Any]]:
    """What a MobileSAM says to the image and the prompts."""
    points = prompts()
    with torch.no_grad():
        embeddings = model.image_encoder(model.preprocess(image())[None])
        sparse, dense = model.prompt_encoder(
            points=(points["point_coords"], points["point_labels"]), boxes=None, masks=None
        )
        low_res_masks, iou_predictions = model.mask_decoder(
            image_embeddings=embeddings,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
    return {
        "image_embeddings": summary(embeddings),
        "low_res_masks": summary(low_res_masks),
        "iou_predictions": summary(iou_predictions),
    }


def record(checkout: str) -> None:
    sys.path.insert(0, checkout)
    from mobile_sam import sam_model_registry

    model = sam_model_registry["vit_t"]()
    state: Mapping[str, Tensor] = model.state_dict()
    model.load_state_dict({name: draw(name, tuple(t.shape)) for name, t in state.items()})
    # Its attention copies the biases into a buffer when it is put in eval mode.
    model.train().eval()
    shapes = {name: "x".join(map(str, tensor.shape)) for name, tensor in state.items()}
    golden = {"answers": answers(model), "tensors": shapes}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"wrote {GOLDEN}")


if __name__ == "__main__":
    record(*sys.argv[1:])
