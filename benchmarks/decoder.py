"""The mask decoder against `segment_anything`'s and `transformers`', with the same weights.

    python benchmarks/decoder.py                            # 64 prompts of one image, one thread
    python benchmarks/decoder.py --threads 2 --out benchmarks/results

Embeddings of 64 x 64 and 16 x 16 tokens, width 256, a point a prompt; forward, and forward and backward. All
three answer the same embeddings, and masks, predicted IoUs and gradients are compared; ours must also be those of
the published code in float64, whose own in float32 were 1.5e-3 off for 64 prompts of 64 x 64 tokens. Then they take
turns in one process.
"""

from __future__ import annotations

import copy
import datetime
import math
import tempfile
from collections.abc import Callable, Mapping

import side_by_side
import torch
import transformers
from segment_anything.modeling import MaskDecoder as PublishedDecoder
from segment_anything.modeling import TwoWayTransformer as PublishedTransformer
from torch import Tensor, nn
from transformers import SamModel

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.save import save_hugging_face, to_hugging_face, to_official_state_dict
from sam_train.models.sam import Sam
from sam_train.structures import Prompts

WIDTH = 256
OURS, PUBLISHED, PEER = "sam-train", "segment_anything", "transformers"
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
PREFIX = "mask_decoder."
EXACT_PROMPTS = 8
"""Prompts whose gradients in float64 fit in memory at a time."""
Answer = Callable[[], tuple[Tensor, Tensor]]


def build(side: int) -> Sam:
    """A SAM of random weights in the published form, with next to no encoder."""
    encoder, decoder = "model.image_encoder", "model.mask_decoder"
    torch.manual_seed(0)
    return build_model(
        model_config(
            "sam_vit_b",
            [
                f"{encoder}.img_size={16 * side}",
                f"{encoder}.embed_dim=16",
                f"{encoder}.depth=1",
                f"{encoder}.num_heads=1",
                f"{encoder}.global_attn_indexes=[0]",
                f"{decoder}.transformer.dropout=0.0",
            ],
        )
    )


def published_decoder(model: Sam) -> PublishedDecoder:
    transformer = PublishedTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8)
    decoder = PublishedDecoder(transformer_dim=WIDTH, transformer=transformer)
    state = to_official_state_dict(model)
    decoder.load_state_dict(
        {name[len(PREFIX) :]: t for name, t in state.items() if name.startswith(PREFIX)}
    )
    return decoder


def peer_model(model: Sam) -> SamModel:
    with tempfile.TemporaryDirectory() as folder:
        save_hugging_face(model, folder)
        return SamModel.from_pretrained(folder)


def our_gradients(model: Sam) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the decoder, by the official and by `SamModel`'s names: converters given gradients for weights."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            zero = torch.zeros_like(parameter)
            parameter.copy_(zero if parameter.grad is None else parameter.grad)
        official = {name: t.clone() for name, t in to_official_state_dict(model).items()}
        of_peer = {name: t.clone() for name, t in to_hugging_face(model)[1].items()}
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return official, of_peer


def gradients(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {prefix + name: p.grad.clone() for name, p in named if p.grad is not None}


def pulled(masks: Tensor, ious: Tensor, pull: Tensor, num_prompts: int) -> Tensor:
    """What is differentiated, or a part of it: every logit pulls its own way, as it does in a loss."""
    return (masks * pull).sum() / (num_prompts * pull[0].numel()) + ious.sum() / (
        num_prompts * ious.shape[1]
    )


def pulls(num_prompts: int, side: int, device: torch.device) -> Tensor:
    shape = (num_prompts, 3, 4 * side, 4 * side)
    return torch.linspace(-1, 1, math.prod(shape), device=device).view(shape)


def exact_gradients(
    published: PublishedDecoder, embedding: Tensor, pe: Tensor, sparse: Tensor, dense: Tensor
) -> dict[str, Tensor]:
    """Those of the published code in float64, a few prompts at a time, by the official names."""
    decoder, image = copy.deepcopy(published).double(), embedding.detach().double().requires_grad_()
    pull = pulls(len(sparse), image.shape[-1], image.device)
    for rows in torch.arange(len(sparse)).split(EXACT_PROMPTS):
        few = slice(int(rows[0]), int(rows[-1]) + 1)
        answer = decoder(image, pe.double(), sparse[few].double(), dense[few].double(), True)
        pulled(*answer, pull[few].double(), len(sparse)).backward()
    assert image.grad is not None
    return {**gradients(decoder, PREFIX), "embedding": image.grad}


def with_backward(
    answer: Answer, module: nn.Module, embedding: Tensor, pull: Tensor
) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad()
        embedding.grad = None
        masks, ious = answer()
        pulled(masks, ious, pull, len(masks)).backward()

    return run


def compare(side: int, num_prompts: int, arguments: object) -> list[list[str]]:
    """Rows of the table for an embedding of `side` x `side` tokens."""
    device, repeats = arguments.device, arguments.repeats  # type: ignore[attr-defined]
    model = build(side).to(device)
    published, peer = published_decoder(model).to(device), peer_model(model).to(device)
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(1, WIDTH, side, side, generator=generator).to(device)
    embedding.requires_grad_()
    coords = 16 * side * torch.rand(num_prompts, 1, 2, generator=generator)
    labels = torch.ones(num_prompts, 1, dtype=torch.long)
    prompts = model.prompt_encoder.to_prompts(points=(coords.to(device), labels.to(device)))
    with torch.no_grad():
        sparse, dense = model.prompt_encoder.embed(Prompts(*prompts))
        pe = model.prompt_encoder.get_dense_pe()
    # One for all prompts, as the prompt encoders hand it out; the weights take gradients' places below.
    dense = dense[:1].clone().expand_as(dense)

    def ours() -> tuple[Tensor, Tensor]:
        return model.mask_decoder(embedding, pe, sparse, dense, True)

    def of_published() -> tuple[Tensor, Tensor]:
        return published(embedding, pe, sparse, dense, True)

    def of_peer() -> tuple[Tensor, Tensor]:
        masks, ious = peer.mask_decoder(embedding, pe, sparse[None], dense[:1], True)[:2]
        return masks[0], ious[0]

    answers: Mapping[str, Answer] = {OURS: ours, PUBLISHED: of_published, PEER: of_peer}
    pull = pulls(num_prompts, side, embedding.device)
    modules = {OURS: model, PUBLISHED: published, PEER: peer}
    with_gradients = {
        name: with_backward(answer, modules[name], embedding, pull)
        for name, answer in answers.items()
    }

    def forward(answer: Answer) -> Callable[[], object]:
        return torch.no_grad()(answer)

    def check(name: str, prefix: str, which: int) -> tuple[float, float]:
        with torch.no_grad():
            pairs = list(zip(ours(), answers[name](), strict=True))
        error = max(side_by_side.largest_difference(*pair) for pair in pairs)
        with_gradients[OURS]()
        got = {**our_gradients(model)[which], "embedding": embedding.grad.clone()}
        with_gradients[name]()
        expected = {**gradients(modules[name], prefix), "embedding": embedding.grad.clone()}
        return error, side_by_side.gradient_difference(got, expected)

    with_gradients[OURS]()
    got = {**our_gradients(model)[0], "embedding": embedding.grad.clone()}
    exact = exact_gradients(published, embedding, pe, sparse, dense)
    of_exact = side_by_side.gradient_difference(
        {name: gradient.double() for name, gradient in got.items()}, exact
    )
    with_gradients[PUBLISHED]()
    theirs = {**gradients(published, PREFIX), "embedding": embedding.grad.clone()}
    rounding = side_by_side.gradient_difference(
        {name: gradient.double() for name, gradient in theirs.items()}, exact
    )
    errors = {PUBLISHED: check(PUBLISHED, PREFIX, 0), PEER: check(PEER, "", 1)}
    rows = []
    for title, runs in (
        ("forward", {name: forward(answer) for name, answer in answers.items()}),
        ("forward and backward", with_gradients),
    ):
        seconds = side_by_side.medians(runs, repeats, device=device)
        for name, (error, gradient_error) in errors.items():
            rows.append(
                [
                    f"{side} x {side}",
                    title,
                    name,
                    f"{1000 * seconds[OURS]:.0f}",
                    f"{1000 * seconds[name]:.0f}",
                    f"{seconds[name] / seconds[OURS]:.2f}",
                    f"{error if title == 'forward' else gradient_error:.1e}",
                ]
            )
    rows.append(
        [f"{side} x {side}", "gradients", f"{PUBLISHED}, float64", "", "", "", f"{of_exact:.1e}"]
    )
    worst, apart = (max(column) for column in zip(*errors.values(), strict=True))
    # Both peers sum in the same order: from ours they may be as far as their own rounding takes them.
    too_far = apart > GRADIENT_TOLERANCE + rounding
    if worst > TOLERANCE or of_exact > GRADIENT_TOLERANCE or too_far:
        print("\n".join(" | ".join(row) for row in rows))
        raise SystemExit(
            f"answers differ by {worst:.1e}, gradients by {of_exact:.1e} from float64 and by {apart:.1e} from "
            f"the peers', which round by {rounding:.1e}; expected {TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e} "
            "beyond that at most"
        )
    return rows


def main() -> None:
    parser = side_by_side.parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 16], help="of the embedding")
    parser.add_argument("--prompts", type=int, default=64)
    arguments = parser.parse_args()
    side_by_side.settle(arguments.threads, arguments.device)
    transformers.utils.logging.disable_progress_bar()
    rows = [row for side in arguments.sides for row in compare(side, arguments.prompts, arguments)]
    header = ["embedding", "pass", "peer", f"{OURS}, ms", "peer, ms", "ratio", "largest difference"]
    report = "\n".join(
        [
            f"# The mask decoder, {datetime.date.today()}",
            "",
            f"{arguments.prompts} prompts of one image, width {WIDTH}, float32, a point each, three masks. "
            f"{side_by_side.machine(arguments.device)}; medians of {arguments.repeats} runs each, taken in "
            "turn in one process. Differences: of answers relative to the largest, of gradients by norm.",
            "",
            side_by_side.table(header, rows),
        ]
    )
    side_by_side.publish(report, "decoder", arguments.out)


if __name__ == "__main__":
    main()
