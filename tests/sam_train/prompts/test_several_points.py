import dataclasses

import pytest
import torch

from sam_train.prompts.draws import PromptDraws
from sam_train.prompts.several_points import SeveralPoints
from sam_train.prompts.simulator import Plan, PromptSimulator
from sam_train.structures import BACKGROUND, FOREGROUND, PADDING, MaskPrediction

SIMULATOR = PromptSimulator(num_corrections=2, num_extra_passes=0, several=SeveralPoints(prob=0.5))


def squares(n: int) -> torch.Tensor:
    masks = torch.zeros(n, 32, 32, dtype=torch.bool)
    masks[:, 12:20, 12:20] = True
    return masks


def test_points_at_once_lie_in_the_object_or_just_beside_it_and_say_which():
    draws = PromptDraws.from_seeds([0], [400])
    prompts = SIMULATOR.first_prompts(squares(400), None, draws, num_points=4)

    assert prompts.mask_inputs is None
    assert prompts.point_labels.shape == (400, 5)
    assert (prompts.point_labels[:, -1] == PADDING).all()
    assert (prompts.point_labels[:, 0] == FOREGROUND).all()
    coords, labels = prompts.point_coords[:, :-1], prompts.point_labels[:, :-1]
    inside = ((coords >= 12) & (coords < 20)).all(dim=2)
    assert torch.equal(inside, labels == FOREGROUND)
    assert ((coords >= 10) & (coords < 22)).all(), "a quarter of the side away"
    beside = (labels[:, 1:] == BACKGROUND).float().mean()
    assert beside == pytest.approx(0.3, abs=0.06)
    assert len(coords[:, 1].unique(dim=0)) > 50


def test_some_batches_start_with_several_points_and_a_single_mask_is_asked_for():
    asked = []

    def decode(prompts, multimask_output):
        asked.append((int((prompts.point_labels >= 0).sum(dim=1)[0]), multimask_output))
        count = 3 if multimask_output else 1
        return MaskPrediction(torch.randn(3, count, 32, 32), torch.rand(3, count))

    draws = PromptDraws.from_seeds([0], [3])
    list(SIMULATOR.rollout(decode, squares(3), None, draws, Plan((True, True), False, 3)))

    assert asked == [(3, False), (4, False)]
    plans = [SIMULATOR.plan(torch.Generator().manual_seed(seed)) for seed in range(300)]
    numbers = torch.tensor([plan.num_first_points for plan in plans])
    assert set(numbers.tolist()) == {1, 2, 3, 4}
    assert (numbers > 1).float().mean() == pytest.approx(0.5, abs=0.1)


def test_without_it_nothing_is_drawn_otherwise():
    plain = dataclasses.replace(SIMULATOR, several=None)
    draws, gt_masks = PromptDraws.from_seeds([5], [50]), squares(50)
    for seed in range(20):
        ours, others = (s.plan(torch.Generator().manual_seed(seed)) for s in (SIMULATOR, plain))
        assert ours[:2] == others[:2]
        assert others.num_first_points == 1
    for first, expected in zip(
        SIMULATOR.first_prompts(gt_masks, None, draws)[:2],
        plain.first_prompts(gt_masks, None, draws)[:2],
        strict=True,
    ):
        assert torch.equal(first, expected)


def test_empty_and_whole_objects_get_points_that_tell_the_truth():
    gt_masks = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)]).bool()
    several = SeveralPoints(prob=1, background_prob=1.0)
    simulator = dataclasses.replace(SIMULATOR, several=several)

    draws = PromptDraws.from_seeds([0], [2])
    prompts = simulator.first_prompts(gt_masks, None, draws, num_points=3)

    assert (prompts.point_labels[0, :3] == BACKGROUND).all()
    assert (prompts.point_labels[1, :3] == FOREGROUND).all()


@pytest.mark.parametrize("wrong", [{"prob": 1.5}, {"prob": 1, "max_points": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="prob|max_points"):
        SeveralPoints(**wrong)
