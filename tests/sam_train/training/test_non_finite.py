"""Losses and gradients that are not finite."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from sam_train.training.non_finite import NonFiniteGuard


def weight(gradient: float) -> torch.Tensor:
    parameter = torch.ones(2, requires_grad=True)
    parameter.grad = torch.tensor([0.0, gradient])
    return parameter


def test_a_bad_loss_stops_and_names_its_images() -> None:
    guard = NonFiniteGuard()
    guard.look_at_loss(torch.tensor(1.0), ["a", "b"], 6)
    with pytest.raises(FloatingPointError, match=r"loss is nan .* images c, d, at step 7"):
        guard.look_at_loss(torch.tensor(math.nan), ["c", "d"], 7)


@pytest.mark.parametrize("gradient", [math.nan, math.inf])
def test_a_bad_gradient_stops_and_names_all_images_of_the_step(gradient: float) -> None:
    guard = NonFiniteGuard()
    for keys in (["a"], ["b"]):
        guard.look_at_loss(torch.tensor(1.0), keys, 3)
    with pytest.raises(FloatingPointError, match=r"gradient is not finite .* images a, b, at step"):
        guard.passes([weight(gradient)], 3, scaled=False)


def test_a_skipped_step_leaves_no_gradient_and_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard, parameter = NonFiniteGuard(action="skip"), weight(math.nan)
    guard.look_at_loss(torch.tensor(1.0), ["a"], 3)
    with caplog.at_level(logging.WARNING):
        assert not guard.passes([parameter], 3, scaled=False)
    assert parameter.grad is None and guard.num_skipped == 1
    assert "images a: step 3 is left out" in caplog.text
    fine = weight(1.0)
    assert guard.passes([fine], 4, scaled=False) and fine.grad is not None
    assert guard.num_in_a_row == 0


def test_too_many_skips_in_a_row_stop_after_all_and_are_counted_over_a_restart() -> None:
    guard = NonFiniteGuard(action="skip", max_in_a_row=3)
    for step in (1, 2):
        guard.look_at_loss(torch.tensor(math.inf), ["a"], step)
        guard.passes([weight(0.0)], step, scaled=False)
    again = NonFiniteGuard(action="skip", max_in_a_row=3)
    again.load_state_dict(guard.state_dict())
    again.look_at_loss(torch.tensor(math.inf), ["b"], 3)
    with pytest.raises(FloatingPointError, match=r"images b, at step 3, the last of 3"):
        again.passes([weight(0.0)], 3, scaled=False)


def test_a_gradient_scalers_overflows_pass_until_they_are_too_many_in_a_row() -> None:
    guard, parameter = NonFiniteGuard(), weight(math.inf)
    for step in range(29):
        guard.look_at_loss(torch.tensor(1.0), ["a"], step)
        assert guard.passes([parameter], step, scaled=True)
    assert parameter.grad is not None, "the scaler has to see it"
    assert guard.passes([weight(1.0)], 30, scaled=True) and guard.num_in_a_row == 0
    for step in range(29):
        guard.passes([parameter], step, scaled=True)
    guard.look_at_loss(torch.tensor(1.0), ["b"], 60)
    with pytest.raises(FloatingPointError, match=r"30 steps in a row.* step 60 .*images b"):
        guard.passes([parameter], 60, scaled=True)


def test_a_bad_loss_on_another_rank_leaves_the_step_out_here_too() -> None:
    guard, parameter = NonFiniteGuard(action="skip"), weight(1.0)
    guard.look_at_loss(torch.tensor(1.0), ["a"], 3, alone=False)
    assert not guard.passes([parameter], 3, scaled=False, elsewhere=True)
    assert parameter.grad is None

    stopping = NonFiniteGuard()
    stopping.look_at_loss(torch.tensor(math.nan), ["a"], 3, alone=False)  # the others wait for it
    assert stopping.met_bad_loss
    with pytest.raises(FloatingPointError, match="images a, at step 3"):
        stopping.passes([weight(1.0)], 3, scaled=False)


@pytest.mark.parametrize("settings", [{"action": "ignore"}, {"max_in_a_row": 0}])
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        NonFiniteGuard(**settings)  # type: ignore[arg-type]
