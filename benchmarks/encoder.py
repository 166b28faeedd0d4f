"""The ViT-B image encoder against `segment_anything`'s and `transformers`', with the same random weights.

    python benchmarks/encoder.py                                  # 1024 px, forward, one thread
    python benchmarks/encoder.py --threads 2 --out benchmarks/results
    python benchmarks/encoder.py --depth 3 --backward             # a part of it, with gradients
    python benchmarks/encoder.py --bf16                           # products of all in bfloat16

The embeddings are compared (and with --backward the gradient of every weight), then all take turns in one
process. `transformers` is asked for both of its attentions.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable
from functools import partial

import side_by_side
import torch
import transformers
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from transformers import SamModel

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.save import save_hugging_face, to_official_state_dict
from sam_train.models.sam import Sam

WIDTH, NUM_HEADS = 768, 12
OURS, PUBLISHED = "sam-train", "segment_anything"
PREFIX = "image_encoder."
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
TOLERANCE_OF_BF16 = 2e-2


def build(img_size: int, depth: int) -> Sam:
    """ViT-B, or its first blocks, of random weights: positions too, which start as zeros."""
    node = "model.image_encoder"
    global_blocks = ",".join(str(i) for i in range(2, depth, 3))
    torch.manual_seed(0)
    overrides = [
        f"{node}.img_size={img_size}",
        f"{node}.depth={depth}",
        f"{node}.global_attn_indexes=[{global_blocks}]",
    ]
    model = build_model(model_config("sam_vit_b", overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.image_encoder.named_parameters():
            if "pos" in name.rsplit(".", 1)[-1]:
                nn.init.normal_(parameter, std=0.2)
    return model


def published_encoder(model: Sam, img_size: int, depth: int) -> ImageEncoderViT:
    encoder = ImageEncoderViT(
        img_size=img_size,
        embed_dim=WIDTH,
        depth=depth,
        num_heads=NUM_HEADS,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=tuple(range(2, depth, 3)),
        window_size=14,
    )
    encoder.load_state_dict(encoder_part(to_official_state_dict(model)))
    return encoder.eval()


def encoder_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name[len(PREFIX) :]: tensor for name, tensor in state.items() if name.startswith(PREFIX)
    }


def our_gradients(model: Sam) -> dict[str, Tensor]:
    """By the official names: the converter given gradients in the place of weights."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            zero = torch.zeros_like(parameter)
            parameter.copy_(zero if parameter.grad is None else parameter.grad)
        converted = encoder_part(to_official_state_dict(model))
        converted = {name: tensor.clone() for name, tensor in converted.items()}
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return converted


def main() -> None:
    parser = side_by_side.parser(__doc__.splitlines()[0], repeats=2)
    parser.add_argument("--depth", type=int, default=12, help="blocks; every third is global")
    parser.add_argument("--img-size", type=int, default=1024)
    parser.add_argument("--backward", action="store_true", help="with gradients")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    arguments = parser.parse_args()
    if arguments.bf16 and arguments.backward:
        parser.error("--bf16 is measured forward alone")
    side_by_side.settle(arguments.threads, arguments.device)
    transformers.utils.logging.disable_progress_bar()
    model = build(arguments.img_size, arguments.depth)
    published = published_encoder(model, arguments.img_size, arguments.depth)
    encoders: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: model.to(arguments.device).image_encoder,
        PUBLISHED: published.to(arguments.device),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_hugging_face(model, folder)
        for kind in ("eager", "sdpa"):
            peer = SamModel.from_pretrained(folder, attn_implementation=kind)
            vision = peer.vision_encoder.to(arguments.device).eval()
            encoders[f"transformers, {kind}"] = lambda x, v=vision: v(x).last_hidden_state
    side = arguments.img_size
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    images = images.to(arguments.device)
    pull = torch.linspace(-1, 1, 256 * (side // 16) ** 2, device=images.device)

    def forward_and_backward(encoder: Callable[[Tensor], Tensor]) -> None:
        model.zero_grad()
        published.zero_grad()
        (encoder(images).flatten() * pull).mean().backward()

    with torch.no_grad():
        expected = encoders[PUBLISHED](images)
    if arguments.bf16:
        kind = torch.device(arguments.device).type
        encoders = {
            name: torch.autocast(kind, torch.bfloat16)(partial(encoder))
            for name, encoder in encoders.items()
        }
    with torch.no_grad():
        errors = {
            name: side_by_side.largest_difference(encoder(images).float(), expected)
            for name, encoder in encoders.items()
        }
    lines = []
    if arguments.backward:
        forward_and_backward(encoders[PUBLISHED])
        gradients = {name: p.grad.clone() for name, p in published.named_parameters()}
        forward_and_backward(encoders[OURS])
        error = side_by_side.gradient_difference(our_gradients(model), gradients)
        lines = [f"Gradients: largest difference to the published ones, by norm, {error:.1e}.", ""]
        if error > GRADIENT_TOLERANCE:
            raise SystemExit(f"the gradients differ by {error:.1e}")
        runs = {name: partial(forward_and_backward, one) for name, one in encoders.items()}
    else:
        runs = {name: torch.no_grad()(partial(one, images)) for name, one in encoders.items()}
    seconds = side_by_side.medians(runs, arguments.repeats, device=arguments.device)
    rows = [
        [name, f"{seconds[name]:.2f}", f"{seconds[name] / seconds[OURS]:.2f}", f"{error:.1e}"]
        for name, error in errors.items()
    ]
    precision = "bfloat16 by autocast, differences to float32" if arguments.bf16 else "float32"
    tolerance = TOLERANCE_OF_BF16 if arguments.bf16 else TOLERANCE
    what = "forward and backward" if arguments.backward else "forward"
    report = "\n".join(
        [
            f"# The image encoder, {datetime.date.today()}",
            "",
            f"ViT-B, {arguments.depth} blocks of width {WIDTH}, one image of {side} px, {precision}, {what}. "
            f"{side_by_side.machine(arguments.device)}; medians of {arguments.repeats} runs each, taken in "
            f"turn in one process. Ratio: to {OURS}. Difference: to {PUBLISHED}, relative to the largest.",
            "",
            *lines,
            side_by_side.table(["encoder", "s", "ratio", "difference"], rows),
        ]
    )
    side_by_side.publish(report, "encoder", arguments.out)
    if errors[OURS] > tolerance:
        raise SystemExit(f"the embeddings differ by {errors[OURS]:.1e}, more than {tolerance:.0e}")


if __name__ == "__main__":
    main()
