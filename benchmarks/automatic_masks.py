"""All masks of an image: our generator against `segment_anything`'s, with the same weights and settings.

    python benchmarks/automatic_masks.py                          # 768 x 1024, ViT of 12 blocks of width 384
    python benchmarks/automatic_masks.py --size 1500 2250 --repeats 1 --out benchmarks/results
    python benchmarks/automatic_masks.py --image PHOTO.jpg --threads 2

From pixels to run lengths, released defaults: 32 x 32 points, 64 at a time, a model input of 1024 px. The
masks are compared one by one, then both take turns in one process; peak memory is that of a process each.
The weights are random, so their masks hang next to nothing on the click; in both models alike a hook on the
decoder draws its logits together round the click, and its scores apart, so that there are masks to filter.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import segment_anything
import side_by_side
import torch
from PIL import Image
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    TwoWayTransformer,
)
from segment_anything.modeling import Sam as PublishedSam
from torch import Tensor, nn

from sam_train import SamAutomaticMaskGenerator
from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.save import to_official_state_dict
from sam_train.data.synthetic import make_scene
from sam_train.models.sam import Sam
from sam_train.ops import rle

OURS, PUBLISHED = "sam-train", "segment_anything"
IMG_SIZE, DEPTH, NUM_HEADS, OUT_CHANS = 1024, 12, 6, 256
GLOBAL_BLOCKS = (2, 5, 8, 11)
RADII = (0.02, 0.05, 0.15)
"""Of the three candidates, as shares of the model input's side."""
SETTINGS = {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.9, "output_mode": "coco_rle"}
SAME_IOU = 0.999
Generate = Callable[[np.ndarray], list[dict[str, Any]]]


def build(width: int) -> Sam:
    """A SAM of random weights in the published form."""
    encoder = "model.image_encoder"
    torch.manual_seed(0)
    overrides = [
        f"{encoder}.embed_dim={width}",
        f"{encoder}.depth={DEPTH}",
        f"{encoder}.num_heads={NUM_HEADS}",
        f"{encoder}.global_attn_indexes={list(GLOBAL_BLOCKS)}".replace(" ", ""),
        "model.mask_decoder.transformer.dropout=0.0",
    ]
    return build_model(model_config("sam_vit_b", overrides)).eval()


def build_published(model: Sam, width: int) -> PublishedSam:
    side = IMG_SIZE // 16
    published = PublishedSam(
        image_encoder=ImageEncoderViT(
            img_size=IMG_SIZE,
            embed_dim=width,
            depth=DEPTH,
            num_heads=NUM_HEADS,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=GLOBAL_BLOCKS,
            window_size=14,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=OUT_CHANS,
            image_embedding_size=(side, side),
            input_image_size=(IMG_SIZE, IMG_SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=OUT_CHANS,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=OUT_CHANS, mlp_dim=2048, num_heads=8
            ),
        ),
    )
    published.load_state_dict(to_official_state_dict(model))
    return published.eval()


class _DrawnTogether:
    """The hooks: what was asked is heard at the prompt encoder, and the answers bent at the decoder."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def on(self, model: Sam | PublishedSam) -> None:
        if isinstance(model, Sam):
            embed = model.prompt_encoder.embed_unread

            def embed_heard(prompts: Any) -> Any:
                self.asked.append(prompts.point_coords)
                return embed(prompts)

            model.prompt_encoder.embed_unread = embed_heard  # type: ignore[method-assign]
        else:
            model.prompt_encoder.register_forward_pre_hook(self._hear, with_kwargs=True)
        model.mask_decoder.register_forward_hook(self._bend)

    def _hear(self, module: Any, args: Any, kwargs: Any) -> None:
        self.asked.append(kwargs["points"][0])

    def _bend(self, module: Any, args: Any, output: Any) -> Any:
        logits, ious = output
        cells = (torch.arange(logits.shape[-1]) + 0.5) / logits.shape[-1]
        x, y = (self.asked.pop()[:, :1].float() / IMG_SIZE).unbind(-1)
        squares = ((cells - x[..., None]) ** 2)[:, 0], ((cells - y[..., None]) ** 2)[:, 0]
        distance = (squares[1][:, :, None] + squares[0][:, None]).sqrt()[:, None]
        spread = (torch.tensor(RADII)[:, None, None] - distance) * 3000
        noise = logits / logits.std((2, 3), keepdim=True)
        # Scores from 0.8 to 1, by the click and the candidate.
        scores = 0.9 + 0.1 * torch.sin(1e3 * (x + 2 * y) + torch.arange(3.0)) + 1e-6 * ious
        return spread + noise, scores


def generators(width: int, names: tuple[str, ...] = (OURS, PUBLISHED)) -> dict[str, Generate]:
    model = build(width)
    found: dict[str, Generate] = {}
    if PUBLISHED in names:
        published = build_published(model, width)
        _DrawnTogether().on(published)
        found[PUBLISHED] = segment_anything.SamAutomaticMaskGenerator(
            published, **SETTINGS
        ).generate
    if OURS in names:
        _DrawnTogether().on(model)
        found[OURS] = SamAutomaticMaskGenerator(model, **SETTINGS).generate
    return found


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """What differs, in words; ends the program where it is more than a few pixels at the threshold."""
    if len(ours) != len(theirs):
        raise SystemExit(f"{len(ours)} masks against {len(theirs)}")
    differing = pixels = 0
    for sides in zip(*(sorted(masks, key=_place) for masks in (ours, theirs)), strict=True):
        if _place(sides[0]) != _place(sides[1]):
            raise SystemExit(f"a mask of {_place(sides[0])} against one of {_place(sides[1])}")
        one, other = (rle.decode(side["segmentation"]) for side in sides)
        wrong = int((one ^ other).sum())
        if wrong > (1 - SAME_IOU) * (one | other).sum():
            raise SystemExit(f"{wrong} of {one.sum()} pixels differ at {_place(sides[0])}")
        differing, pixels = differing + wrong, pixels + int(other.sum())
    return f"{len(ours)} masks on both sides, {differing} of {pixels} pixels differ"


def _place(mask: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(mask["point_coords"][0]), round(mask["predicted_iou"], 4)


def peak_memory(name: str, width: int, image: np.ndarray, threads: int) -> float:
    """MiB that one of them takes beyond what its process had before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (name, width, image, threads))


def _measure_memory(name: str, width: int, image: np.ndarray, threads: int) -> float:
    torch.set_num_threads(threads)
    generate = generators(width, (name,))[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generate(image)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def picture(arguments: argparse.Namespace) -> np.ndarray:
    if arguments.image:
        with Image.open(arguments.image) as opened:
            return np.asarray(opened.convert("RGB"))
    image, _ = make_scene(np.random.default_rng(0), tuple(arguments.size))
    return image


def main() -> None:
    parser = side_by_side.parser(__doc__.splitlines()[0], repeats=3)
    parser.add_argument("--size", type=int, nargs=2, default=[768, 1024], help="H W of a scene")
    parser.add_argument("--image", help="a picture instead")
    parser.add_argument("--width", type=int, default=384, help="of the ViT's 12 blocks")
    arguments = parser.parse_args()
    side_by_side.settle(arguments.threads, arguments.device)
    image = picture(arguments)
    memory = {
        name: peak_memory(name, arguments.width, image, arguments.threads)
        for name in (OURS, PUBLISHED)
    }
    runs = generators(arguments.width)
    answers: dict[str, Any] = {}

    def run(name: str) -> None:
        answers[name] = runs[name](image)

    seconds = side_by_side.medians(
        {name: partial(run, name) for name in runs}, arguments.repeats, device=arguments.device
    )
    equality = compare(answers[OURS], answers[PUBLISHED])
    ratio = seconds[PUBLISHED] / seconds[OURS]
    rows = [
        [
            name,
            f"{seconds[name]:.1f}",
            f"{memory[name]:.0f}",
            "1" if name == OURS else f"{ratio:.2f}",
        ]
        for name in (OURS, PUBLISHED)
    ]
    report = "\n".join(
        [
            f"# Automatic masks, {datetime.date.today()}",
            "",
            f"An image of {image.shape[0]} x {image.shape[1]} px, model input 1024 px, a ViT of 12 blocks of "
            f"width {arguments.width}, 1,024 points, 64 at a time. "
            f"{side_by_side.machine(arguments.device)}; medians of {arguments.repeats} run(s) after one that "
            f"warms up, taken in turn in one process. {equality}.",
            "",
            side_by_side.table(["", "s", "peak memory, MiB more", "time / ours"], rows),
        ]
    )
    side_by_side.publish(report, "automatic-masks", arguments.out)


if __name__ == "__main__":
    main()
