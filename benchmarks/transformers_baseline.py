"""Trains `transformers`' `SamModel` from random weights on the nuclei shards: the peer to beat.

    python benchmarks/transformers_baseline.py --lr 1e-4 3e-4 1e-3 --out outputs/hf

Several learning rates are each tried for `--trial-seconds`, with a schedule of that length; the one of
the highest scores on the first images of val then gets the whole budget. One thread: no CPU time is lost
in waiting for another.

A plain loop, self-contained, given everything known to help so that the comparison is fair: an
AdamW of one learning rate, warm-up and cosine over the budget, BCE + dice + IoU error, box prompts
for half of the images, zoomed crops, and shared cross-attention projections at the start. The
budget counts the CPU time of all threads (1800 s is 15 minutes on two cores), from the first
training step to the last; reading the data and the evaluation are outside it.

Three defaults of `transformers` are only right for loading published weights, and are mended here:
the vision encoder's weights start at a standard deviation of 1e-10, those of the prompt encoder and
mask decoder at 0.02 (the published code: PyTorch's defaults), and the frequencies of the position
code at half the encoder's width (the published code: 1, and not trained), where neighbouring pixels
have unrelated codes.
"""

import argparse
import io
import json
import logging
import math
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_rle
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from sam_train import allocator

LOG = logging.getLogger("transformers_baseline")
IMG_SIZE = 256  # model input, pixels
MASK_SIZE = 64  # side of the low-res masks
STRIDE = IMG_SIZE // MASK_SIZE
PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)
MIN_WIDTH_PX, MIN_AREA_PX = 3, 6  # of a training mask, in low-res pixels
NUM_IMAGES, NUM_MASKS, NUM_CORRECTIONS = (
    4,
    16,
    2,
)  # a step's batch and clicks after the first prompt


class Patch(NamedTuple):
    """One mask, cut to its box: `mask` uint8 (h, w) with its corner at (x, y) of the image."""

    x: int
    y: int
    mask: np.ndarray


class Example(NamedTuple):
    """An image uint8 (H, W, 3), RGB, and its masks."""

    image: np.ndarray
    patches: list[Patch]


class Batch(NamedTuple):
    """Shapes, N images of M masks each: images (N, 3, S, S) normalised; masks bool (N, M, s, s) on
    the low-res grid; boxes (N, M, 4) float xyxy in the model input frame."""

    images: Tensor
    masks: Tensor
    boxes: Tensor


# ---------------------------------------------------------------- data


def read_shards(paths: list[Path]) -> list[Example]:
    """Decodes every image and mask of SA-1B-style shards into memory."""
    examples = []
    for path in paths:
        images: dict[str, np.ndarray] = {}
        annotations: dict[str, list[dict[str, Any]]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                file = tar.extractfile(member)
                assert file is not None
                if extension == "json":
                    annotations[key] = json.load(file)["annotations"]
                else:
                    image = Image.open(io.BytesIO(file.read())).convert("RGB")
                    images[key] = np.asarray(image)
        for key, image_array in images.items():
            patches = [decode_patch(annotation) for annotation in annotations[key]]
            examples.append(Example(image_array, patches))
    return examples


def decode_patch(annotation: dict[str, Any]) -> Patch:
    mask = coco_rle.decode(annotation["segmentation"])
    x, y, width, height = (int(value) for value in coco_rle.toBbox(annotation["segmentation"]))
    return Patch(x, y, np.ascontiguousarray(mask[y : y + height, x : x + width]))


def to_model_input(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes the longest side, normalises and pads bottom and right with zeros, as SAM does.

    Args:
        image: uint8 (H, W, 3), RGB.

    Returns:
        float32 (3, IMG_SIZE, IMG_SIZE) and the unpadded input size (h, w).
    """
    height, width = image.shape[:2]
    scale = IMG_SIZE / max(height, width)
    input_height, input_width = int(height * scale + 0.5), int(width * scale + 0.5)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = cv2.resize(image, (input_width, input_height), interpolation=interpolation)
    padded = np.zeros((IMG_SIZE, IMG_SIZE, 3), np.float32)
    padded[:input_height, :input_width] = (resized - PIXEL_MEAN) / PIXEL_STD
    return padded.transpose(2, 0, 1), (input_height, input_width)


def training_view(
    example: Example, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A random crop around a random mask, flipped at random, with NUM_MASKS of its masks.

    Small objects are zoomed until they are MIN_WIDTH_PX wide on the low-res grid.

    Returns:
        Arrays as one image of `Batch`, or None where the crop shows no mask large enough.
    """
    image, patches = example
    height, width = image.shape[:2]
    anchor = patches[rng.integers(len(patches))]
    zoomed_side = max(height, width) * math.exp(rng.uniform(math.log(0.25), math.log(1.25)))
    widest_side = min(anchor.mask.shape) * MASK_SIZE / MIN_WIDTH_PX
    side = int(max(32, min(zoomed_side, widest_side, max(height, width))))
    crop_h, crop_w = min(side, height), min(side, width)
    centre_y = anchor.y + anchor.mask.shape[0] // 2
    centre_x = anchor.x + anchor.mask.shape[1] // 2
    y0 = int(np.clip(centre_y - rng.integers(crop_h), 0, height - crop_h))
    x0 = int(np.clip(centre_x - rng.integers(crop_w), 0, width - crop_w))
    flips = tuple(axis for axis in (0, 1) if rng.random() < 0.5)
    pixels = np.flip(image[y0 : y0 + crop_h, x0 : x0 + crop_w], flips)

    masks, boxes = [], []
    for index in rng.permutation(len(patches)):
        visible = paste(patches[index], x0, y0, crop_h, crop_w)
        if visible is None:
            continue
        # Padded to a square first: the low-res grid covers the padded model input.
        square = np.zeros((max(crop_h, crop_w),) * 2, np.uint8)
        square[:crop_h, :crop_w] = np.flip(visible, flips)
        low_res = cv2.resize(square * 255, (MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_AREA)
        mask = low_res > 127
        if mask.sum() < MIN_AREA_PX:
            continue
        masks.append(mask)
        columns, rows = np.flatnonzero(square.any(0)), np.flatnonzero(square.any(1))
        corners = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
        boxes.append(corners * (IMG_SIZE / len(square)))
        if len(masks) == NUM_MASKS:
            break
    if not masks:
        return None
    chosen = np.resize(np.arange(len(masks)), NUM_MASKS)  # repeats where there are too few
    input_image, _ = to_model_input(np.ascontiguousarray(pixels))
    return input_image, np.stack(masks)[chosen], np.stack(boxes)[chosen]


def paste(patch: Patch, x0: int, y0: int, height: int, width: int) -> np.ndarray | None:
    """The mask as seen in a crop: uint8 (height, width), or None where it is outside."""
    top, left = max(patch.y, y0), max(patch.x, x0)
    bottom = min(patch.y + patch.mask.shape[0], y0 + height)
    right = min(patch.x + patch.mask.shape[1], x0 + width)
    if top >= bottom or left >= right:
        return None
    visible = patch.mask[top - patch.y : bottom - patch.y, left - patch.x : right - patch.x]
    if not visible.any():
        return None
    canvas = np.zeros((height, width), np.uint8)
    canvas[top - y0 : bottom - y0, left - x0 : right - x0] = visible
    return canvas


def batches(examples: list[Example], seed: int) -> Iterator[Batch]:
    """Endless batches; every image once before any comes again."""
    rng = np.random.default_rng(seed)
    views: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while True:
        for index in rng.permutation(len(examples)):
            view = training_view(examples[index], rng)
            if view is None:
                continue
            views.append(view)
            if len(views) == NUM_IMAGES:
                images, masks, boxes = (np.stack(arrays) for arrays in zip(*views, strict=True))
                yield Batch(*(torch.from_numpy(array) for array in (images, masks, boxes)))
                views.clear()


# ---------------------------------------------------------------- model


def build_model() -> SamModel:
    """A `SamModel` with 6 layers of width 192 and a decoder of width 128, at random weights."""
    width = 128
    model = SamModel(
        SamConfig(
            vision_config={
                "image_size": IMG_SIZE,
                "patch_size": 16,
                "hidden_size": 192,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "mlp_ratio": 4.0,
                "window_size": 8,
                "global_attn_indexes": [2, 5],
                "output_channels": width,
                "num_pos_feats": width // 2,
                "initializer_range": 0.02,  # 1e-10 by default
            },
            prompt_encoder_config={
                "image_size": IMG_SIZE,
                "patch_size": 16,
                "hidden_size": width,
                "mask_input_channels": 16,
            },
            mask_decoder_config={
                "hidden_size": width,
                "mlp_dim": 8 * width,
                "iou_head_hidden_dim": width,
            },
        )
    )
    for part in (model.prompt_encoder, model.mask_decoder):
        for module in part.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    positions = model.shared_image_embedding.positional_embedding
    nn.init.normal_(positions, std=1.0)
    positions.requires_grad_(False)
    assert model.prompt_encoder.shared_embedding.positional_embedding is positions

    # The cross-attentions start by matching equal codes: a click's with the image's, by position.
    transformer = model.mask_decoder.transformer
    attentions: list[Any] = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        nn.init.orthogonal_(attention.q_proj.weight, gain=2.0)
        with torch.no_grad():
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        nn.init.zeros_(attention.q_proj.bias)
        nn.init.zeros_(attention.k_proj.bias)
    return model


def decode(
    model: SamModel,
    embeddings: Tensor,
    *,
    multimask_output: bool,
    boxes: Tensor | None = None,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    mask_inputs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the decoder for P prompts, one embedding (P, C, h, w) each.

    `SamModel` adds `input_masks` to the embedding per image, not per prompt, so that every prompt
    has to be an "image" of its own.

    Args:
        model: The model.
        embeddings: (P, C, h, w).
        multimask_output: Three candidates, else one.
        boxes: (P, 4) xyxy, model input frame.
        points: (P, N, 2) xy, model input frame.
        labels: (P, N), 1 foreground, 0 background.
        mask_inputs: (P, s, s) logits.

    Returns:
        low_res_masks (P, M, s, s), logits, and iou_predictions (P, M).
    """
    output = model(
        image_embeddings=embeddings,
        input_boxes=None if boxes is None else boxes[:, None],
        input_points=None if points is None else points[:, None],
        input_labels=None if labels is None else labels[:, None],
        input_masks=None if mask_inputs is None else mask_inputs[:, None],
        multimask_output=multimask_output,
    )
    return output.pred_masks[:, 0], output.iou_scores[:, 0]


# ---------------------------------------------------------------- training


def uniform_click(region: Tensor) -> Tensor:
    """A point (P, 2) xy in the model input frame, uniform in each of the regions bool (P, s, s)."""
    scores = torch.where(region, torch.rand(region.shape), -1.0)
    flat = scores.flatten(1).argmax(1)
    cells = torch.stack([flat % MASK_SIZE, flat // MASK_SIZE], dim=1)
    # Anywhere inside the low-res pixel; the encoder itself adds the 0.5 taken off here.
    return (cells + torch.rand(cells.shape)) * STRIDE - 0.5


def correction_click(gt_masks: Tensor, low_res_masks: Tensor) -> tuple[Tensor, Tensor]:
    """A click uniform in the error and its label; uniform in the mask where there is no error.

    Args:
        gt_masks: bool (P, s, s).
        low_res_masks: logits (P, s, s).

    Returns:
        points (P, 2) xy in the model input frame and labels (P,).
    """
    error = gt_masks ^ (low_res_masks > 0)
    region = torch.where(error.flatten(1).any(1)[:, None, None], error, gt_masks)
    points = uniform_click(region)
    cells = ((points + 0.5) / STRIDE).long().clamp(0, MASK_SIZE - 1)
    labels = gt_masks[torch.arange(len(gt_masks)), cells[:, 1], cells[:, 0]].long()
    return points, labels


@dataclass(frozen=True, kw_only=True)
class Loss:
    """BCE, dice and the IoU head's squared error, of the candidate of lowest mask loss."""

    bce_weight: float
    dice_weight: float
    iou_weight: float

    def __call__(self, low_res_masks: Tensor, ious: Tensor, gt_masks: Tensor) -> Tensor:
        """Mean loss of low_res_masks (P, M, s, s), ious (P, M) against gt_masks bool (P, s, s)."""
        target = gt_masks[:, None].expand_as(low_res_masks).float()
        bce = F.binary_cross_entropy_with_logits(low_res_masks, target, reduction="none")
        probability = low_res_masks.sigmoid()
        overlap = (probability * target).sum((2, 3))
        total = probability.sum((2, 3)) + target.sum((2, 3))
        dice = 1 - (2 * overlap + 1) / (total + 1)
        mask_loss = self.bce_weight * bce.mean((2, 3)) + self.dice_weight * dice
        with torch.no_grad():
            predicted = low_res_masks > 0
            gt = gt_masks[:, None]
            union = (predicted | gt).sum((2, 3)).clamp(min=1)
            true_ious = (predicted & gt).sum((2, 3)) / union
        # Every candidate's IoU is learnt: the head has to rank them.
        iou_loss = (ious - true_ious).square().mean(1)
        return (mask_loss.min(1).values + self.iou_weight * iou_loss).mean()


def interaction_loss(
    model: SamModel, embeddings: Tensor, gt_masks: Tensor, boxes: Tensor | None, loss: Loss
) -> tuple[Tensor, float]:
    """First prompt and corrective clicks for P masks.

    Args:
        model: The model.
        embeddings: (P, C, h, w), each mask's image.
        gt_masks: bool (P, s, s).
        boxes: (P, 4) first prompts, or None for a click uniform in the mask.
        loss: Called on each prediction.

    Returns:
        The mean loss over prompts, and the mean IoU after the first, on the low-res grid.
    """
    points = labels = None
    if boxes is None:
        points = uniform_click(gt_masks)[:, None]
        labels = torch.ones(len(gt_masks), 1, dtype=torch.long)
    masks, ious = decode(
        model, embeddings, boxes=boxes, points=points, labels=labels, multimask_output=True
    )
    losses = [loss(masks, ious, gt_masks)]
    best = masks.detach()[torch.arange(len(masks)), ious.argmax(1)]
    union = ((best > 0) | gt_masks).sum((1, 2))
    first_iou = (((best > 0) & gt_masks).sum((1, 2)) / union).mean().item()
    for _ in range(NUM_CORRECTIONS):
        point, label = correction_click(gt_masks, best)
        points = point[:, None] if points is None else torch.cat([points, point[:, None]], 1)
        labels = label[:, None] if labels is None else torch.cat([labels, label[:, None]], 1)
        masks, ious = decode(
            model,
            embeddings,
            boxes=boxes,
            points=points,
            labels=labels,
            mask_inputs=best,
            multimask_output=False,
        )
        losses.append(loss(masks, ious, gt_masks))
        best = masks.detach()[:, 0]
    return torch.stack(losses).mean(), first_iou


def batch_loss(model: SamModel, batch: Batch, loss: Loss) -> tuple[Tensor, dict[str, float]]:
    """Half of the images are prompted by noisy boxes, half by clicks; returns loss and figures."""
    # Not get_image_embeddings(): that one switches gradients off.
    embeddings = model.vision_encoder(batch.images).last_hidden_state
    order = torch.randperm(len(batch.images))
    total, figures = torch.zeros(()), {}
    for name, group in zip(("box", "click"), order.chunk(2), strict=True):
        boxes = None
        if name == "box":
            boxes = batch.boxes[group].flatten(0, 1)
            sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            boxes = boxes + (torch.randn_like(boxes) * 0.1 * sides).clamp(-20, 20)
        part, figures[f"{name}_iou"] = interaction_loss(
            model,
            embeddings[group].repeat_interleave(NUM_MASKS, 0),
            batch.masks[group].flatten(0, 1),
            boxes,
            loss,
        )
        total = total + part / 2
    return total, figures


def train(
    model: SamModel,
    data: Iterator[Batch],
    args: argparse.Namespace,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Trains until the CPU budget is spent; `save(result)` is called every 300 CPU seconds."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    )
    loss = Loss(
        bce_weight=args.bce_weight, dice_weight=args.dice_weight, iou_weight=args.iou_weight
    )
    result: dict[str, Any] = {
        "lr": args.lr,
        "seed": args.seed,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "images_per_step": NUM_IMAGES,
        "masks_per_step": NUM_IMAGES * NUM_MASKS,
        "curve": [],
    }
    window: list[dict[str, float]] = []
    cpu_start, wall_start, saved_at = time.process_time(), time.perf_counter(), 0.0
    cpu_s, step = 0.0, 0
    while cpu_s < args.cpu_seconds:
        progress = cpu_s / args.cpu_seconds
        warm_up = min(1.0, (progress + 1e-3) / 0.05)
        rate = args.lr * warm_up * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, figures = batch_loss(model, next(data), loss)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0)  # returned unclipped
        optimizer.step()
        step += 1
        cpu_s = time.process_time() - cpu_start
        window.append({"loss": total.item(), "grad_norm": grad_norm.item(), **figures})
        if step == 1 or step % 20 == 0:
            means = {name: float(np.mean([row[name] for row in window])) for name in window[0]}
            wall_s = time.perf_counter() - wall_start
            row = {"step": step, "cpu_s": cpu_s, "wall_s": wall_s, "lr": rate, **means}
            LOG.info(" ".join(f"{name} {value:.4g}" for name, value in row.items()))
            result["curve"].append(row)
            window.clear()
        wall_s = time.perf_counter() - wall_start
        result |= {"steps": step, "cpu_seconds": cpu_s, "wall_seconds": wall_s}
        if cpu_s - saved_at > 300:
            saved_at = cpu_s
            save(result)
    return result


# ---------------------------------------------------------------- evaluation


def inner_click(patch: Patch) -> tuple[int, int]:
    """The pixel (x, y) farthest from the mask's boundary, in the original image."""
    distance = cv2.distanceTransform(np.pad(patch.mask, 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return patch.x + int(x) - 1, patch.y + int(y) - 1


@torch.inference_mode()
def evaluate(model: SamModel, examples: list[Example]) -> dict[str, float]:
    """Mean IoU at original resolution after one click and, apart from it, after the true box."""
    click_ious: list[Tensor] = []
    box_ious: list[Tensor] = []
    for image, patches in examples:
        height, width = image.shape[:2]
        input_image, input_size = to_model_input(image)
        embedding = model.get_image_embeddings(torch.from_numpy(input_image)[None])
        # The published frame: (x, y) times the exact ratio of the sides.
        scale = torch.tensor([input_size[1] / width, input_size[0] / height])
        for start in range(0, len(patches), 32):
            chunk = patches[start : start + 32]
            gt_masks = np.zeros((len(chunk), height, width), bool)
            for gt_mask, (x, y, mask) in zip(gt_masks, chunk, strict=True):
                gt_mask[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
            gt = torch.from_numpy(gt_masks)
            clicks = torch.tensor([inner_click(patch) for patch in chunk]) * scale
            corners = [(p.x, p.y, p.x + p.mask.shape[1], p.y + p.mask.shape[0]) for p in chunk]
            boxes = torch.tensor(corners) * scale.repeat(2)
            embeddings = embedding.expand(len(chunk), -1, -1, -1)
            ones = torch.ones(len(chunk), 1, dtype=torch.long)
            by_click = decode(
                model, embeddings, points=clicks[:, None], labels=ones, multimask_output=True
            )
            by_box = decode(model, embeddings, boxes=boxes, multimask_output=True)
            for (masks, scores), ious in ((by_click, click_ious), (by_box, box_ious)):
                best = masks[torch.arange(len(masks)), scores.argmax(1)]
                predicted = to_original_size(best, input_size, (height, width))
                union = (predicted | gt).sum((1, 2))
                ious.append((predicted & gt).sum((1, 2)) / union)
    return {
        "mean_iou@1": torch.cat(click_ious).mean().item(),
        "box_mean_iou": torch.cat(box_ious).mean().item(),
        "num_images": len(examples),
        "num_masks": sum(len(example.patches) for example in examples),
    }


def to_original_size(
    low_res_masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
) -> Tensor:
    """Logits (P, s, s) to masks bool (P, H, W): up to the input, unpad, up to the original."""
    logits = F.interpolate(
        low_res_masks[:, None], (IMG_SIZE, IMG_SIZE), mode="bilinear", align_corners=False
    )
    logits = logits[..., : input_size[0], : input_size[1]]
    logits = F.interpolate(logits, original_size, mode="bilinear", align_corners=False)
    return logits[:, 0] > 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    default_data = os.environ.get("SAM_TRAIN_DATA", "../shared/data")
    parser.add_argument("--data", type=Path, default=Path(default_data), help="holds nuclei/")
    default_out = Path("outputs/benchmarks/transformers_baseline")
    parser.add_argument("--out", type=Path, default=default_out)
    parser.add_argument("--cpu-seconds", type=float, default=1800.0, help="of all threads together")
    parser.add_argument("--trial-seconds", type=float, default=300.0, help="likewise, of a trial")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bce-weight", type=float, default=1.0)
    parser.add_argument("--dice-weight", type=float, default=1.0)
    parser.add_argument("--iou-weight", type=float, default=1.0)
    parser.add_argument(
        "--trial-images", type=int, default=40, help="of val, to choose the rate on"
    )
    return parser.parse_args()


def run(args: argparse.Namespace, lr: float, cpu_seconds: float, out: Path) -> dict[str, Any]:
    """Trains one model from the same random start, and saves a Hugging Face folder and `result.json`."""
    torch.manual_seed(args.seed)
    model = build_model()
    out.mkdir(parents=True, exist_ok=True)

    def save(result: dict[str, Any]) -> None:
        model.save_pretrained(out)
        (out / "result.json").write_text(json.dumps(result, indent=1))

    model.train()
    examples = read_shards(shards_of(args.data, "train"))
    settings = argparse.Namespace(**{**vars(args), "lr": lr, "cpu_seconds": cpu_seconds})
    result = train(model, batches(examples, args.seed), settings, save)
    model.eval()
    is_trial = cpu_seconds < args.cpu_seconds
    val = read_shards(shards_of(args.data, "val"))
    result["val"] = evaluate(model, val[: args.trial_images if is_trial else None])
    LOG.info("lr %g, %.0f s: %s", lr, cpu_seconds, result["val"])
    save(result)
    return result


def shards_of(data: Path, split: str) -> list[Path]:
    shards = sorted((data / "nuclei").glob(f"{split}-*.tar"))
    if not shards:
        raise SystemExit(f"no nuclei shards below {data}: name the data folder with --data")
    return shards


def main() -> None:
    """Chooses the learning rate, trains with it and evaluates on all of nuclei val."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    allocator.keep_freed_memory()  # as our own commands do
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    best = args.lr[0]
    if len(args.lr) > 1:
        trials = {
            lr: run(args, lr, args.trial_seconds, args.out / f"trial_{lr:g}")["val"]
            for lr in args.lr
        }
        best = max(trials, key=lambda lr: trials[lr]["mean_iou@1"] + trials[lr]["box_mean_iou"])
    val = run(args, best, args.cpu_seconds, args.out)["val"]
    print(
        f"lr {best:g}: mean_iou@1 {val['mean_iou@1']:.3f}, box_mean_iou {val['box_mean_iou']:.3f}"
    )


if __name__ == "__main__":
    main()
