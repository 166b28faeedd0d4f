"""What the average of a model's weights is, and what stands beside it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_train.models.image_encoder import TinyVitEncoder
from sam_train.training.weight_average import WeightAverage


class Steps:
    """A small encoder with batch norm under an average, step by step."""

    def __init__(self, *, decay: float) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.module: Any = SimpleNamespace(model=self.model)
        self.trainer: Any = SimpleNamespace(global_step=0, sanity_checking=False)
        self.average = WeightAverage(decay=decay)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3)

    def go(self, steps: range) -> None:
        self.trainer.global_step = steps.start
        self.average.on_train_start(self.trainer, self.module)
        for step in steps:
            images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            (self.model(images) - 1).square().mean().backward()
            self.optimizer.step()
            self.trainer.global_step = step + 1
            self.average.on_train_batch_end(self.trainer, self.module)

    def answers(self) -> dict[str, Tensor]:
        with self.average.in_place(self.module):
            return {name: value.clone() for name, value in self.model.state_dict().items()}


def test_running_statistics_are_averaged_as_the_weights_are() -> None:
    run = Steps(decay=0.5)
    run.go(range(0))
    expected = {name: value.clone() for name, value in run.model.state_dict().items()}
    for step in range(6):
        run.go(range(step, step + 1))
        decay = min(0.5, (2 + step) / (11 + step))
        for name, value in run.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value

    latest = {name: value.clone() for name, value in run.model.state_dict().items()}
    averaged = run.answers()

    for name in ("0.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(averaged[name], expected[name])
        assert not torch.equal(averaged[name], latest[name])
    assert averaged["1.num_batches_tracked"] == latest["1.num_batches_tracked"] == 6
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, latest[name]), f"{name} comes back"


def test_an_average_with_statistics_goes_on_bit_for_bit() -> None:
    whole = Steps(decay=0.9)
    whole.go(range(6))

    begun = Steps(decay=0.9)
    begun.go(range(3))
    resumed = Steps(decay=0.9)
    resumed.model.load_state_dict(copy.deepcopy(begun.model.state_dict()))
    resumed.average.load_state_dict(copy.deepcopy(begun.average.state_dict()))
    resumed.go(range(3, 6))

    expected = whole.answers()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.answers().items())


@pytest.mark.parametrize("decay", [0.0, 0.999])
def test_a_models_constants_stay_what_they_are(tiny_sam: nn.Module, decay: float) -> None:
    before = dict(tiny_sam.named_buffers())
    kept = {name: buffer.clone() for name, buffer in before.items()}
    average, module = WeightAverage(decay=decay), SimpleNamespace(model=tiny_sam)
    trainer: Any = SimpleNamespace(global_step=0, sanity_checking=False)
    average.on_train_start(trainer, module)
    trainer.global_step = 1
    average.on_train_batch_end(trainer, module)
    with average.in_place(module):
        assert all(torch.equal(buffer, kept[name]) for name, buffer in before.items())


def test_mobile_sams_encoder_has_statistics_to_average() -> None:
    with torch.device("meta"):
        encoder = TinyVitEncoder(name="tiny_vit_5m_224", img_size=64, out_chans=32)
    average = WeightAverage()
    average.on_train_start(
        SimpleNamespace(global_step=0),  # type: ignore[arg-type]
        SimpleNamespace(model=encoder),
    )
    assert len(average.average) > len(list(encoder.parameters()))
