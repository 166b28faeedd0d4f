"""Plans are read into steps, or refused with the step's number; every packaged one is read."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from data_engine import settings
from data_engine.plan import HUMAN, Step, read_steps
from data_engine.plan_check import check_rounds, check_steps
from data_engine.records import Round
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
        ([{"stage": "assisted", "num_images": "three"}], "step 1: num_images: expected int"),
        (["assisted"], "step 1: a step is {stage: assisted, num_images: 100}, say; got assisted"),
        ([{"stage": "assisted", "overrides": "seed=1"}], "step 1: overrides: expected array"),
        ([{"stage": "semi_automatic"}], "step 1: the box detector .* none is before it"),
        ([{"stage": "automatic", "human_weight": 0}], "step 1: human_weight is above 0"),
    ],
)
def test_a_step_that_cannot_be_is_told_by_its_number(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_steps({"steps": steps})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"recipe": "nuclear"}, "step 1: .*nuclear"),
        ({"overrides": ["trainer.max_step=1"]}, "step 1: trainer.max_step.*max_steps"),
        ({"settings": {"que": "prominence"}}, "step 1: .*que"),
        ({"settings": {"queue": "loudness"}}, "step 1: .*queue"),
        ({"checkpoint": "no/such.pth"}, "step 1: checkpoint: there is no file no/such.pth"),
    ],
)
def test_what_would_come_up_after_people_s_work_is_told_before(
    step: dict[str, Any], message: str
) -> None:
    values = settings.resolved(settings.composed(["root=x", "checkpoint=y"]))

    with pytest.raises(ValueError, match=message):
        check_steps([Step(stage="assisted", **step)], values)


def test_boxes_and_a_detector_s_recipe_are_looked_for(tmp_path: Any) -> None:
    values = settings.resolved(settings.composed(["root=x", "checkpoint=y"]))
    given = Step(stage="semi_automatic", detector_boxes="no.json", retrain=False)
    trained = Step(stage="semi_automatic", detector_recipe="detective", retrain=False)

    with pytest.raises(ValueError, match="detector_boxes: there is no file no.json"):
        check_steps([given], values)
    with pytest.raises(ValueError, match="detective"):
        check_steps([trained], values)
    (tmp_path / "retrain_mine.yaml").write_text("# @package _global_\ndefaults: [retrain]\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "retrain_mine.yaml").rename(tmp_path / "experiment" / "retrain_mine.yaml")
    own = {**values, "config_dir": str(tmp_path)}
    check_steps([Step(stage="assisted", recipe="retrain_mine")], own)


def test_steps_that_were_begun_may_not_be_moved_or_taken_out() -> None:
    rounds = [Round(number=1, stage="assisted", state="done", plan_step=0)]

    check_rounds([Step(stage="assisted"), Step(stage="automatic")], rounds)
    with pytest.raises(ValueError, match="step 1 is automatic now, and round 1 was begun as ass"):
        check_rounds([Step(stage="automatic")], rounds)
    with pytest.raises(ValueError, match="step 1 is gone"):
        check_rounds([], rounds)
