"""Mistakes in a plan that would else come up after people's work: recipes, settings and files that are not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from data_engine.plan import PARENT, Step
from data_engine.records import Round
from sam_train import cli_arguments, cli_errors, config

WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")


def check_steps(
    steps: Sequence[Step], settings: Mapping[str, Any], *, numbers: Sequence[int] | None = None
) -> None:
    """Builds what steps are done with, and composes the trainings after them.

    Args:
        steps: of a plan.
        settings: of the engine.
        numbers: those to look at, from 0; None: all.

    Raises:
        ValueError: of the first mistake, with the step's number from 1.
    """
    seen: set[tuple[Any, ...]] = set()
    for number in range(len(steps)) if numbers is None else numbers:
        step = steps[number]
        try:
            config.instantiate(stage_node(settings, step))
            _check_files(step)
            for recipe in _recipes(step):
                if recipe not in seen:
                    _check_training(*recipe, settings["config_dir"])
                    seen.add(recipe)
        except (ValueError, OSError) as error:
            raise ValueError(f"plan.steps, step {number + 1}: {error}") from None
        except (HydraException, OmegaConfBaseException) as error:
            said = cli_errors.describe(error, root="engine")
            raise ValueError(f"plan.steps, step {number + 1}: {said or error}") from None


def stage_node(settings: Mapping[str, Any], step: Step) -> dict[str, Any]:
    """What builds the stage of a step: its node of `stages`, with the step's own settings."""
    return config.merged(settings["stages"][step.stage], step.settings)


def check_rounds(steps: Sequence[Step], rounds: Sequence[Round]) -> None:
    """Sees that what was begun of a plan is still what it says: a round knows its step by its place.

    Raises:
        ValueError: a step is gone or of another stage.
    """
    for round_ in rounds:
        place = round_.plan_step
        if place >= len(steps) or steps[place].stage != round_.stage:
            there = "is gone" if place >= len(steps) else f"is {steps[place].stage} now"
            raise ValueError(
                f"plan.steps, step {place + 1} {there}, and round {round_.number} was begun as "
                f"{round_.stage}: leave the steps of rounds that were begun where they are, and change those "
                "behind them"
            )


def _check_files(step: Step) -> None:
    named = {"detector_boxes": step.detector_boxes}
    if step.checkpoint != PARENT and str(step.checkpoint).endswith(WEIGHT_SUFFIXES):
        named["checkpoint"] = step.checkpoint
    for name, place in named.items():
        if place is not None and not Path(place).expanduser().is_file():
            raise FileNotFoundError(f"{name}: there is no file {place}")


def _recipes(step: Step) -> list[tuple[str, tuple[str, ...]]]:
    """Recipe and overrides of the trainings of a step."""
    found = [(step.recipe, tuple(step.overrides))] if step.trains else []
    if step.stage == "semi_automatic" and step.detector_boxes is None:
        found.append((step.detector_recipe, tuple(step.detector_overrides)))
    return found


def _check_training(recipe: str, overrides: Sequence[str], config_dir: str | None) -> None:
    given = ["checkpoint=x", "data=rounds"]
    typed = cli_arguments.parse([f"experiment={recipe}", *given, *overrides]).overrides
    try:
        config.compose("train", typed, config_dir=config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        said = cli_errors.describe(error, root="train", overrides=typed, config_dir=config_dir)
        raise ValueError(said or str(error)) from None
