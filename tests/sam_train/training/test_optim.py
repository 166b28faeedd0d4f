"""Which parameters learn how fast, and how the rate goes over a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from sam_train.models.image_encoder import SamVitEncoder, TimmEncoder, TinyVitEncoder
from sam_train.models.mask_decoder import MaskDecoder
from sam_train.models.prompt_encoder import PromptEncoder
from sam_train.models.sam import Sam
from sam_train.models.two_way_transformer import TwoWayTransformer
from sam_train.training.interactive import InteractiveTraining
from sam_train.training.optim import (
    AdamW,
    CosineSchedule,
    Muon,
    StepSchedule,
    layers_above,
    parameter_table,
)

DEPTH = 4


def sam_with(image_encoder: nn.Module) -> Sam:
    """A small decoder behind an encoder of 32 channels."""
    return Sam(
        image_encoder=image_encoder,
        prompt_encoder=PromptEncoder(embed_dim=32),
        mask_decoder=MaskDecoder(
            transformer_dim=32,
            transformer=TwoWayTransformer(depth=1, embedding_dim=32, num_heads=2, mlp_dim=32),
        ),
    )


@pytest.fixture(scope="module")
def vit_sam() -> Sam:
    return sam_with(
        SamVitEncoder(
            embed_dim=16,
            depth=DEPTH,
            num_heads=2,
            global_attn_indexes=[3],
            window_size=2,
            img_size=64,
            out_chans=32,
        )
    )


@pytest.fixture(scope="module")
def tiny_vit_sam() -> Sam:
    return sam_with(TinyVitEncoder(img_size=64, out_chans=32))


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The parameter group of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def built(model: Sam, layer_decay: float = 1.0) -> dict[str, dict[str, Any]]:
    optim = AdamW(lr=0.01, schedule=StepSchedule(), weight_decay=0.1, layer_decay=layer_decay)
    return by_name(model, optim.build(model))


def test_layers_nearer_to_the_pixels_learn_more_slowly(vit_sam: Sam) -> None:
    groups = built(vit_sam, layer_decay=0.5)

    def rate(start: str) -> float:
        (lr,) = {group["lr"] for name, group in groups.items() if name.startswith(start)}
        return float(lr) / 0.01

    backbone = "image_encoder.backbone"
    assert rate(f"{backbone}.patch_embed") == rate(f"{backbone}.pos_embed") == 0.5 ** (DEPTH + 1)
    for layer in range(DEPTH):
        assert rate(f"{backbone}.blocks.{layer}.") == 0.5 ** (DEPTH - layer)
    assert rate(f"{backbone}.neck") == 1
    assert rate("mask_decoder") == rate("prompt_encoder") == 1


def test_ten_layers_are_not_mistaken_for_one() -> None:
    encoder = SamVitEncoder(
        embed_dim=8, depth=12, num_heads=1, global_attn_indexes=[], img_size=64, out_chans=32
    )
    model = sam_with(encoder)

    assert layers_above(model, "image_encoder.backbone.blocks.1.mlp.fc1.weight", 0.9) == 11
    assert layers_above(model, "image_encoder.backbone.blocks.10.mlp.fc1.weight", 0.9) == 2


def test_tiny_vit_decays_by_stage(tiny_vit_sam: Sam) -> None:
    rates = {
        name: group["lr"] / 0.01 for name, group in built(tiny_vit_sam, layer_decay=0.5).items()
    }

    def only(start: str) -> float:
        (rate,) = {rate for name, rate in rates.items() if name.startswith(start)}
        return float(rate)

    stages = [only(f"image_encoder.backbone.stages.{i}.") for i in range(4)]
    assert stages == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert only("image_encoder.backbone.patch_embed") == 0.5**5
    assert only("image_encoder.neck") == 1


def test_a_timm_pyramid_decays_by_stage(tiny_sam: Sam) -> None:
    groups = built(tiny_sam, layer_decay=0.5)
    rates = {name: group["lr"] / 0.01 for name, group in groups.items()}

    def only(start: str) -> float:
        (rate,) = {rate for name, rate in rates.items() if name.startswith(start)}
        return float(rate)

    stages = [only(f"image_encoder.backbone.stages_{i}.") for i in range(4)]
    assert stages == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert only("image_encoder.backbone.stem_0") == 0.5**5
    assert only("image_encoder.neck") == only("mask_decoder") == 1


def test_an_encoder_without_numbered_layers_is_told_so() -> None:
    encoder = TimmEncoder(name="resnet10t", img_size=64, stride=16, out_chans=32)
    with pytest.raises(ValueError, match=r"numbered layers.*got TimmEncoder.*layer_decay=1"):
        built(sam_with(encoder), layer_decay=0.8)


def test_biases_norms_and_positions_keep_no_weight_decay(vit_sam: Sam, tiny_vit_sam: Sam) -> None:
    decayed = {name for name, group in built(vit_sam).items() if group["weight_decay"] > 0}
    bare = {name for name, group in built(vit_sam).items() if group["weight_decay"] == 0}

    assert "image_encoder.backbone.pos_embed" in bare
    assert "image_encoder.backbone.blocks.0.attn.rel_pos_h" in bare
    assert "image_encoder.backbone.blocks.0.norm1.weight" in bare
    assert "image_encoder.backbone.blocks.0.attn.qkv.weight" in decayed
    assert "mask_decoder.mask_tokens.weight" in decayed
    assert not any(name.endswith("bias") for name in decayed)
    tiny = {n: g["weight_decay"] for n, g in built(tiny_vit_sam).items() if "attention_bias" in n}
    assert tiny
    assert set(tiny.values()) == {0.0}


def test_every_parameter_is_in_one_group(vit_sam: Sam) -> None:
    optim = AdamW(lr=0.01, schedule=StepSchedule(), layer_decay=0.7)
    in_groups = [p for group in optim.build(vit_sam).param_groups for p in group["params"]]

    assert sorted(map(id, in_groups)) == sorted(map(id, vit_sam.parameters()))


def test_frozen_parameters_are_left_out(tiny_sam: Sam) -> None:
    tiny_sam.image_encoder.requires_grad_(False)
    groups = built(tiny_sam)

    assert groups
    assert not any(name.startswith("image_encoder") for name in groups)

    tiny_sam.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to train"):
        built(tiny_sam)


def test_muon_takes_what_lies_between_features(tiny_sam: Sam) -> None:
    optim = Muon(lr=0.01, schedule=StepSchedule(), weight_decay=0.1, matrix_lr_scale=3.0)
    groups = by_name(tiny_sam, optim.build(tiny_sam))

    assert groups.keys() == {name for name, _ in tiny_sam.named_parameters()}
    tables = ("point_embeddings", "_embed.weight", "_token.weight", "_tokens.weight")
    for name, group in groups.items():
        # Norms have vectors, and what is looked up by number is no map between features.
        is_matrix = tiny_sam.get_parameter(name).ndim > 1 and not any(
            table in name for table in tables
        )
        assert group["use_fallback"] is not is_matrix, name
        assert group["lr"] == pytest.approx(0.03 if is_matrix else 0.01), name
    assert groups["mask_decoder.mask_tokens.weight"]["weight_decay"] == 0.1
    assert groups["mask_decoder.iou_prediction_head.layers.0.bias"]["weight_decay"] == 0.0


def test_a_step_of_muon_moves_all_directions_of_a_matrix_alike(tiny_sam: Sam) -> None:
    model = copy.deepcopy(tiny_sam)
    optimizer = Muon(lr=0.01, schedule=StepSchedule(), weight_decay=0.0).build(model)
    layer = model.mask_decoder.transformer.layers[0].mlp.lin1
    before = layer.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 8, generator=generator) for n in layer.weight.shape)
    scales = torch.logspace(0, -2, 8)  # one direction's gradient is a hundredth of another's
    layer.weight.grad = (left * scales) @ right.T
    optimizer.step()

    moved = torch.linalg.svdvals(layer.weight.detach() - before)[:8]
    assert moved.max() < 2 * moved.min()


def test_the_schedule_reaches_every_rule_of_muon(tiny_sam: Sam) -> None:
    """timm before 1.0.27 left the rate of the rest where it was."""
    model = copy.deepcopy(tiny_sam)
    optimizer = Muon(lr=0.01, schedule=StepSchedule(), weight_decay=0.0).build(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (3, 1.0), (9, 1.0), (10, 0.1), (19, 0.1), (20, 0.01), (500, 0.01)],
)
def test_steps_drop_the_rate_at_the_milestones(step: int, expected: float) -> None:
    schedule = StepSchedule(warmup_steps=4, milestones=(10, 20), gamma=0.1)

    assert schedule.scale(step, progress=0.9) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "progress", "expected"),
    [
        (0, 0.0, 0.5),  # half of the warm-up's two steps
        (1, 0.0, 1.0),
        (100, 1 / 3, 0.1 + 0.9 * 0.75),
        (100, 0.5, 0.55),
        (100, 1.0, 0.1),
        (100, 1.2, 0.1),
    ],
)
def test_the_cosine_follows_the_progress(step: int, progress: float, expected: float) -> None:
    schedule = CosineSchedule(warmup_steps=2, final=0.1)

    assert schedule.scale(step, progress) == pytest.approx(expected)


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert CosineSchedule(warmup_steps=0).scale(0, 0.0) == 1.0
    assert StepSchedule(warmup_steps=0, milestones=()).scale(0, 0.0) == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, "expected lr > 0"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay >= 0"),
        ({"lr": 0.1, "layer_decay": 1.5}, "layer_decay is above 0 and at most 1, got 1.5"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(schedule=StepSchedule(), **wrong)


class Progress:
    """Stands in for a trainer that has come so far."""

    def __init__(self, step: int, max_steps: int, callbacks: Sequence[Any] = ()) -> None:
        self.global_step, self.max_steps, self.callbacks = step, max_steps, callbacks
        self.world_size = 1


def test_a_run_ends_by_steps_or_by_time_whichever_is_nearer(
    make_training: Callable[..., InteractiveTraining],
) -> None:
    from lightning.pytorch.callbacks import Timer

    training = make_training()
    timer = Timer(duration={"seconds": 100})
    timer.load_state_dict({"time_elapsed": {"train": 25.0}})

    def progress(*args: Any) -> float:
        training._trainer = Progress(*args)  # type: ignore[assignment]
        return training.progress()

    assert progress(30, 40) == 0.75
    assert progress(0, -1) == 0.0, "a run without an end"
    assert progress(1, 40, [timer]) == pytest.approx(0.25), "a resumed clock goes on"
    assert progress(30, 40, [timer]) == 0.75
    assert progress(90, 40) == 1.0


def test_the_table_counts_by_part(tiny_sam: Sam) -> None:
    tiny_sam.image_encoder.requires_grad_(False)

    lines = {line.split()[0]: line.split()[1:] for line in parameter_table(tiny_sam).splitlines()}

    encoder = sum(p.numel() for p in tiny_sam.image_encoder.parameters())
    rest = sum(p.numel() for p in tiny_sam.parameters()) - encoder
    assert lines["part"] == ["trainable", "frozen"]
    assert lines["image_encoder"] == ["0", f"{encoder:,}"]
    assert lines["all"] == [f"{rest:,}", f"{encoder:,}"]
