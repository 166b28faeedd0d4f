"""Plans are read into steps, or refused with the step's number; every packaged one is read."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from data_engine import settings
from data_engine.plan import HUMAN, read_steps
from sam_train import config


@pytest.mark.parametrize("name", config.options("plan"))
def test_a_packaged_plan_is_read_and_its_recipes_are_there(name: str) -> None:
    cfg = settings.composed(["root=x", f"plan={name}"])

    steps = read_steps(settings.resolved(cfg)["plan"])

    recipes = config.options("experiment")
    assert all(step.recipe in recipes and step.detector_recipe in recipes for step in steps)
    assert all(step.trains == (step.stage in HUMAN) or step.retrain for step in steps)


@pytest.mark.parametrize("name", ["nuclei_small", "natural_small"])
def test_what_a_plan_says_of_other_parts_counts(name: str) -> None:
    said = OmegaConf.load(config.conf_dir() / "plan" / f"{name}.yaml")

    cfg = settings.composed(["root=x", f"plan={name}"])

    assert {"preset", "measure"} <= said.keys()
    assert OmegaConf.merge(cfg, said) == cfg


def test_the_plan_of_sa_1b_trains_six_times_then_five_times() -> None:
    """SAM, section 4, and the images of its stages."""
    steps = read_steps(settings.resolved(settings.composed(["root=x", "plan=sa1b"]))["plan"])

    assisted = [step for step in steps if step.stage == "assisted"]
    semi_automatic = [step for step in steps if step.stage == "semi_automatic"]
    assert [len(assisted), len(semi_automatic)] == [6, 5]
    assert sum(step.num_images or 0 for step in assisted) == 120_000
    assert sum(step.num_images or 0 for step in semi_automatic) == 180_000
    assert steps[-1].stage == "automatic" and steps[-1].num_images is None
    assert (steps[0].recipe, assisted[-1].recipe) == ("sa1b_vit_b", "sa1b_vit_h")


def test_what_a_step_does_not_say_is_as_the_plan_s_defaults_have_it() -> None:
    plan = {"defaults": {"recipe": "nuclei", "num_images": 3}}
    (first, second) = read_steps(
        {**plan, "steps": [{"stage": "assisted"}, {"stage": "automatic", "recipe": "natural"}]}
    )

    assert (first.recipe, first.num_images, first.trains) == ("nuclei", 3, True)
    assert (second.recipe, second.num_images, second.trains) == ("natural", 3, False)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "plan.steps is a list of steps"),
        (None, "plan.steps is a list of steps"),
        ([{"stage": "assisted"}, {"stage": "manual"}], "step 2: a step's stage is one of assisted"),
        ([{}], "step 1: .*stage"),
        ([{"stage": "assisted", "num_image": 3}], "step 1: unknown num_image; a step has"),
        ([{"stage": "assisted", "num_images": 0}], "step 1: num_images is 1 or more"),
        ([{"stage": "automatic", "human_weight": 0}], "step 1: human_weight is above 0"),
    ],
)
def test_a_step_that_cannot_be_is_told_by_its_number(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_steps({"steps": steps})
