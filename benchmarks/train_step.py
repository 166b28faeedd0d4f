"""The interactive training step against the same step around `transformers`' `SamModel`.

    python benchmarks/train_step.py                            # a small ViT, a decoder of SAM's width
    python benchmarks/train_step.py --out benchmarks/results   # also writes the table there

Both models have one architecture and, by this project's own converters, the same weights. A step is
four images of sixteen masks: a point, three corrections with the last logits fed back, focal and dice
loss on each answer, AdamW. First both answer the same prompts, and the gradient of every parameter is
compared. Then they take turns in one process, each with its own annotator, and the medians are shown by
part. One thread, so that a shared machine disturbs neither.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import SamModel

from sam_train import allocator
from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.save import save_hugging_face, to_hugging_face
from sam_train.losses.mask import MaskLoss
from sam_train.losses.multimask import InteractiveLoss
from sam_train.models.common import DenseCells
from sam_train.models.sam import Sam
from sam_train.prompts.simulator import PromptSimulator
from sam_train.structures import ImageBatch, Prompts
from sam_train.training.interactive import InteractiveTraining
from sam_train.training.optim import AdamW, StepSchedule

IMG_SIZE, NUM_IMAGES, NUM_MASKS, NUM_CORRECTIONS = 256, 4, 16, 3
STRIDE = 4
"""Input pixels a cell of the mask grid."""
WARM_UPS = 3
"""Steps of each before those that are timed: until then the heap still grows, and pages are touched first."""
PARTS = (
    "encoder, forward",
    "encoder, backward",
    "prompt encoder, forward",
    "decoder, forward",
    "decoder, backward",
    "loss, forward",
    "loss and prompt encoder, backward",
    "annotator",
    "optimiser",
    "rest",
)


class Clock:
    """Adds up seconds of CPU time by part; what runs inside another part counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.running = ["rest"]
        self.since = time.process_time()

    def switch(self, part: str) -> None:
        """From now on, time is this part's."""
        now = time.process_time()
        self.seconds[self.running[-1]] += now - self.since
        self.since, self.running[-1] = now, part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self.running[-1]
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return run

    def switches_at_gradient_of(self, tensor: Tensor, part: str) -> None:
        """When the gradient of `tensor` is there, the backward pass has come to `part`."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.switch(part))


class OurStep:
    """This project's training step, its parts timed."""

    name = "sam-train"

    def __init__(self, model: Sam, clock: Clock) -> None:
        self.model = model.train()
        self.clock = clock
        self.asked: list[tuple[Prompts, bool]] = []
        simulator = PromptSimulator(box_prob=0, num_corrections=NUM_CORRECTIONS, num_extra_passes=0)
        self.training = InteractiveTraining(
            model=model,
            prompts=simulator,
            val_prompts=simulator,
            loss=InteractiveLoss(),
            optim=AdamW(lr=1e-5, weight_decay=0.1, schedule=StepSchedule(warmup_steps=0)),
        )
        self.optimizer = self.training.optim.build(model)
        self._time_the_parts()

    def _time_the_parts(self) -> None:
        training, model, clock = self.training, self.model, self.clock
        encode, decode = model.encode, model.decode
        embed, answer = model.prompt_encoder.embed_unread, model.mask_decoder.forward

        def timed_encode(images: Tensor, input_sizes: Tensor) -> Any:
            with clock.part("encoder, forward"):
                features = encode(images, input_sizes)
            clock.switches_at_gradient_of(features.image_embeddings, "encoder, backward")
            return features

        def timed_embed(prompts: Prompts) -> tuple[Tensor, Tensor | DenseCells]:
            with clock.part("prompt encoder, forward"):
                sparse, dense = embed(prompts)
            embedded = dense if isinstance(dense, Tensor) else dense.cells
            clock.switches_at_gradient_of(embedded, "loss and prompt encoder, backward")
            return sparse, dense

        def timed_answer(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            with clock.part("decoder, forward"):
                masks, ious = answer(*arguments, **named)
            clock.switches_at_gradient_of(masks, "decoder, backward")
            return masks, ious

        def recorded(features: Any, prompts: Prompts, **named: Any) -> Any:
            self.asked.append((prompts, named["multimask_output"]))
            return decode(features, prompts, **named)

        for owner, name, function in (
            (model, "encode", timed_encode),
            (model, "decode", recorded),
            (model.prompt_encoder, "embed_unread", timed_embed),
            (model.mask_decoder, "forward", timed_answer),
            (training, "loss", clock.timed("loss, forward", training.loss)),
            # There is no trainer that would keep what is logged.
            (training, "log", lambda *_, **__: None),
            (training, "log_dict", lambda *_, **__: None),
        ):
            object.__setattr__(owner, name, function)
        for name in ("first_prompts", "correct"):
            function = clock.timed("annotator", getattr(training.prompts, name))
            object.__setattr__(training.prompts, name, function)

    def loss(self, batch: ImageBatch) -> Tensor:
        self.asked.clear()
        return self.training._loss(batch)

    def gradients(self) -> dict[str, Tensor]:
        """By `SamModel`'s names: the converter, given gradients in the place of weights."""
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        with torch.no_grad():
            for parameter in self.model.parameters():
                no_gradient = torch.zeros_like(parameter)
                parameter.copy_(no_gradient if parameter.grad is None else parameter.grad)
            converted = {name: t.clone() for name, t in to_hugging_face(self.model)[1].items()}
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        return converted


class PeerStep:
    """The same step written around `SamModel`, as one would from its documentation."""

    name = "transformers"

    def __init__(self, model: SamModel, clock: Clock) -> None:
        self.model = model.train()
        self.clock = clock
        # Fixed in the published model, and not trained here either.
        model.shared_image_embedding.positional_embedding.requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.1)
        self.mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        self.std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        prompt_encoder, decoder = model.prompt_encoder, model.mask_decoder
        embed, answer = prompt_encoder.forward, decoder.forward

        def timed_embed(**named: Any) -> tuple[Tensor, Tensor]:
            with clock.part("prompt encoder, forward"):
                sparse, dense = embed(**named)
            clock.switches_at_gradient_of(dense, "loss and prompt encoder, backward")
            return sparse, dense

        def timed_answer(**named: Any) -> Any:
            with clock.part("decoder, forward"):
                masks, *others = answer(**named)
            clock.switches_at_gradient_of(masks, "decoder, backward")
            return masks, *others

        prompt_encoder.forward, decoder.forward = timed_embed, timed_answer

    def loss(self, batch: ImageBatch, asked: list[tuple[Prompts, bool]] | None = None) -> Tensor:
        """The mean loss of all answers; to recorded prompts, or to the step's own."""
        with self.clock.part("encoder, forward"):
            pixels = (batch.images - self.mean) / self.std
            # Not get_image_embeddings, which switches gradients off.
            embeddings = self.model.vision_encoder(pixels).last_hidden_state
        self.clock.switches_at_gradient_of(embeddings, "encoder, backward")
        # SamModel takes one mask prompt an image, so every prompt is an image of its own.
        each = embeddings.repeat_interleave(NUM_MASKS, dim=0)
        losses: list[Tensor] = []
        points = labels = best = None
        for index in range(NUM_CORRECTIONS + 1):
            if asked is None:
                with self.clock.part("annotator"):
                    point, label = click(batch.masks, best)
                    points = point if points is None else torch.cat([points, point], dim=1)
                    labels = label if labels is None else torch.cat([labels, label], dim=1)
                    mask_inputs = None if best is None else best[:, None]
            else:
                recorded = asked[index][0]
                # SamModel appends the padding point itself.
                points, labels = recorded.point_coords[:, :-1], recorded.point_labels[:, :-1]
                mask_inputs = recorded.mask_inputs
            assert points is not None and labels is not None
            output = self.model(
                image_embeddings=each,
                input_points=points[:, None],
                input_labels=labels[:, None],
                input_masks=mask_inputs,
                multimask_output=index == 0,
            )
            masks, ious = output.pred_masks[:, 0], output.iou_scores[:, 0]
            with self.clock.part("loss, forward"):
                losses.append(plain_loss(masks, ious, batch.masks))
            best = masks.detach()[torch.arange(len(masks)), ious.argmax(dim=1)]
        return torch.stack(losses).mean()

    def gradients(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}


def click(gt_masks: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """A click uniform in the error: (P, 1, 2) in the model input frame and (P, 1) labels."""
    error = gt_masks if logits is None else gt_masks ^ (logits > 0)
    region = torch.where(error.flatten(1).any(1)[:, None, None], error, gt_masks)
    cells = torch.multinomial(region.flatten(1).float(), 1)[:, 0]
    side = gt_masks.shape[-1]
    x, y = cells % side, cells // side
    labels = gt_masks[torch.arange(len(cells)), y, x].long()
    coords = (torch.stack([x, y], dim=1) + 0.5) * STRIDE - 0.5
    return coords[:, None], labels[:, None]


def plain_loss(masks: Tensor, ious: Tensor, gt_masks: Tensor) -> Tensor:
    """Focal 20, dice 1, IoU 1; of the candidates the one of lowest mask loss learns."""
    settings = MaskLoss()
    target = gt_masks[:, None].expand_as(masks).float()
    probability = masks.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(masks, target, reduction="none")
    right = probability * target + (1 - probability) * (1 - target)
    weight = settings.focal_alpha * target + (1 - settings.focal_alpha) * (1 - target)
    focal = (weight * (1 - right) ** settings.focal_gamma * cross_entropy).mean((2, 3))
    overlap = (probability * target).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    mask_loss = settings.focal * focal + settings.dice * dice
    with torch.no_grad():
        predicted, gt = masks > 0, gt_masks[:, None]
        true_ious = (predicted & gt).sum((2, 3)) / (predicted | gt).sum((2, 3)).clamp(min=1)
    return (mask_loss.min(dim=1).values + (ious - true_ious).square().mean(dim=1)).mean()


def build(width: int, depth: int, decoder_width: int) -> Sam:
    """A SAM of random weights in the published form, without dropout."""
    encoder, decoder = "model.image_encoder", "model.mask_decoder"
    config = model_config(
        "sam_vit_b",
        [
            f"{encoder}.img_size={IMG_SIZE}",
            f"{encoder}.embed_dim={width}",
            f"{encoder}.depth={depth}",
            f"{encoder}.num_heads={max(1, width // 64)}",
            f"{encoder}.global_attn_indexes=[{depth // 2 - 1},{depth - 1}]",
            f"{encoder}.out_chans={decoder_width}",
            f"{decoder}.transformer.dropout=0.0",
        ],
    )
    torch.manual_seed(0)
    return build_model(config)


def made_up_batch() -> ImageBatch:
    """Noise with discs that stand out from it."""
    generator = torch.Generator().manual_seed(0)
    side = IMG_SIZE // STRIDE
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    draws = torch.rand(NUM_IMAGES * NUM_MASKS, 3, generator=generator)
    centers, radii = 8 + draws[:, :2] * (side - 16), 2 + draws[:, 2] * 10
    distance = (torch.stack([x, y], dim=-1)[None] - centers[:, None, None]).norm(dim=-1)
    masks = distance <= radii[:, None, None]
    shown = masks.view(NUM_IMAGES, NUM_MASKS, side, side).any(dim=1)
    images = torch.rand(NUM_IMAGES, 3, IMG_SIZE, IMG_SIZE, generator=generator) * 120
    images += 100 * shown.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)[:, None]
    boxes = torch.cat([centers - radii[:, None], centers + radii[:, None]], dim=1) * STRIDE
    return ImageBatch(
        images=images.to(torch.uint8),
        input_sizes=torch.full((NUM_IMAGES, 2), IMG_SIZE),
        masks=masks,
        boxes=boxes,
        image_index=torch.arange(NUM_IMAGES).repeat_interleave(NUM_MASKS),
        keys=tuple(f"image-{i}" for i in range(NUM_IMAGES)),
        seeds=tuple(range(NUM_IMAGES)),
    )


def compare_gradients(ours: OurStep, peer: PeerStep, batch: ImageBatch) -> tuple[float, str, int]:
    """The largest difference of a parameter's gradients by norm, its name, and the number compared.

    Relative to the peer's norm; where that is rounding noise (a key's bias, which a softmax takes out
    again), relative to a millionth of the norm of all.
    """
    ours.model.zero_grad()
    peer.model.zero_grad()
    ours.loss(batch).backward()
    peer.loss(batch, ours.asked).backward()
    expected, got = peer.gradients(), ours.gradients()
    of_all = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = {
        name: float((got[name] - gradient).norm() / gradient.norm().clamp(min=1e-6 * of_all))
        for name, gradient in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst, len(errors)


def take_step(step: OurStep | PeerStep, batch: ImageBatch) -> dict[str, float]:
    """Seconds by part of one optimiser step."""
    clock = step.clock
    clock.seconds.clear()
    clock.since = time.process_time()
    step.optimizer.zero_grad()
    loss = step.loss(batch)
    with clock.part("loss and prompt encoder, backward"):
        loss.backward()
    with clock.part("optimiser"):
        nn.utils.clip_grad_norm_(step.model.parameters(), 1.0)
        step.optimizer.step()
    clock.switch("rest")
    return dict(clock.seconds)


def table(times: dict[str, list[dict[str, float]]]) -> str:
    """Medians by part, in ms, and the ratio; a row a part."""
    ours, peer = (times[step.name] for step in (OurStep, PeerStep))
    lines = [f"| part | {OurStep.name}, ms | {PeerStep.name}, ms | ratio |", "|---|---|---|---|"]

    def row(name: str, of: Callable[[dict[str, float]], float]) -> str:
        a, b = (1000 * statistics.median(map(of, runs)) for runs in (ours, peer))
        return f"| {name} | {a:.1f} | {b:.1f} | {b / a if a else float('nan'):.2f} |"

    for part in PARTS:
        lines.append(row(part, lambda run, part=part: run.get(part, 0.0)))  # type: ignore[misc]
    lines.append(row("**all**", lambda run: sum(run.values())))
    decoder = tuple(part for part in PARTS if part.startswith("decoder"))
    lines.append(
        row("all but the decoder", lambda run: sum(run.values()) - sum(map(run.get, decoder)))  # type: ignore[arg-type]
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=192, help="of the ViT")
    parser.add_argument("--depth", type=int, default=6, help="blocks of the ViT")
    parser.add_argument("--decoder-width", type=int, default=256, help="SAM's is 256")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each that are timed")
    parser.add_argument("--out", type=Path, help="folder that also gets the table as a file")
    arguments = parser.parse_args()
    allocator.keep_freed_memory(huge_pages=True)  # as sam-train does
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = build(arguments.width, arguments.depth, arguments.decoder_width)
    with tempfile.TemporaryDirectory() as folder:
        save_hugging_face(model, folder)
        peer_model = SamModel.from_pretrained(folder)
    ours, peer = OurStep(model, Clock()), PeerStep(peer_model, Clock())
    batch = made_up_batch()
    error, worst, number = compare_gradients(ours, peer, batch)
    times: dict[str, list[dict[str, float]]] = {ours.name: [], peer.name: []}
    for repeat in range(-WARM_UPS, arguments.repeats):
        for step in (ours, peer) if repeat % 2 else (peer, ours):
            seconds = take_step(step, batch)
            if repeat >= 0:
                times[step.name].append(seconds)
    report = "\n".join(
        [
            f"# The training step, {datetime.date.today()}",
            "",
            f"{NUM_IMAGES} images of {IMG_SIZE} px, {NUM_MASKS} masks each, a point and "
            f"{NUM_CORRECTIONS} corrections. ViT of {arguments.depth} blocks of width "
            f"{arguments.width}, decoder of width {arguments.decoder_width}. CPU time of one thread, float32, "
            f"torch {torch.__version__}, transformers {transformers.__version__}; medians of "
            f"{arguments.repeats} steps each after {WARM_UPS}, taken in turn in one process.",
            "",
            f"Gradients of {number} parameters to the same prompts: largest relative difference "
            f"{error:.1e} ({worst}).",
            "",
            table(times),
        ]
    )
    print(report)
    if error > 1e-3:
        raise SystemExit("the gradients differ by more than 1e-3: the steps are not the same")
    if arguments.out is not None:
        path = arguments.out / f"{datetime.date.today()}-train-step.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
