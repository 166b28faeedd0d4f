import dataclasses

import pytest
import torch
from omegaconf import OmegaConf

from sam_train import config
from sam_train.prompts import simulator as simulator_module
from sam_train.prompts.draws import PromptDraws
from sam_train.prompts.points import Clicks, uniform_click
from sam_train.prompts.simulator import (
    Plan,
    PromptSimulator,
    add_clicks,
    box_prompts,
    click_prompts,
)
from sam_train.structures import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    PADDING,
    MaskPrediction,
    Prompts,
)

SIDE = 32


def objects(n: int, seed: int = 0) -> torch.Tensor:
    """Rectangles of different sizes, well inside the grid."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, SIDE, SIDE, dtype=torch.bool)
    for mask in masks:
        x, y, w, h = torch.randint(4, 12, (4,), generator=generator).tolist()
        mask[y : y + h, x : x + w] = True
    return masks


class RecordingModel:
    """Answers with noise that depends on the prompt alone, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Prompts, bool]] = []
        self.weight = torch.nn.Parameter(torch.ones(()))

    def __call__(self, prompts: Prompts, multimask_output: bool) -> MaskPrediction:
        self.asked.append((prompts, multimask_output))
        num_candidates = 3 if multimask_output else 1
        logits, ious = [], []
        for coords, labels in zip(prompts.point_coords, prompts.point_labels, strict=True):
            seed = int((coords * (labels >= 0)[:, None]).sum() * 16) + len(labels)
            generator = torch.Generator().manual_seed(seed)
            logits.append(torch.randn(num_candidates, SIDE, SIDE, generator=generator))
            ious.append(torch.rand(num_candidates, generator=generator))
        return MaskPrediction(torch.stack(logits) * self.weight, torch.stack(ious) * self.weight)


def run(simulator: PromptSimulator, gt_masks: torch.Tensor, draws=None, plan_seed=0, **kwargs):
    model = RecordingModel()
    draws = PromptDraws.from_seeds([5], [len(gt_masks)]) if draws is None else draws
    plan = simulator.plan(torch.Generator().manual_seed(plan_seed))
    passes = list(simulator.rollout(model, gt_masks, None, draws, plan, **kwargs))
    return passes, model


def test_the_papers_plan_has_eleven_passes_two_of_them_without_a_new_click():
    places = set()
    for seed in range(200):
        plan = PromptSimulator().plan(torch.Generator().manual_seed(seed))
        without = [i for i, is_new in enumerate(plan.new_prompt) if not is_new]
        assert len(plan.new_prompt) == 11
        assert len(without) == 2
        assert without[1] == 10
        assert not plan.mask_first
        places.add(without[0])
    assert places == set(range(1, 9))


@pytest.mark.parametrize(
    ("corrections", "extra", "expected"),
    [(0, 0, [True]), (0, 1, [True, False]), (2, 0, [True] * 3), (1, 2, [True, False, True, False])],
)
def test_short_plans(corrections, extra, expected):
    simulator = PromptSimulator(num_corrections=corrections, num_extra_passes=extra)

    assert list(simulator.plan(torch.Generator()).new_prompt) == expected


def test_three_candidates_are_asked_for_in_the_first_pass_only():
    _, model = run(PromptSimulator(), objects(4))

    assert [multimask for _, multimask in model.asked] == [True] + [False] * 10


def test_each_pass_builds_on_the_last_answer_and_says_one_click_more_or_nothing_new():
    passes, model = run(PromptSimulator(), objects(6))

    assert [p.pass_index for p in passes] == list(range(11))
    assert passes[0].prompts.mask_inputs is None
    for before, after in zip(passes, passes[1:], strict=False):
        rows = torch.arange(6)
        expected = before.prediction.low_res_masks[rows, before.chosen][:, None]
        assert torch.equal(after.prompts.mask_inputs, expected)
        assert not after.prompts.mask_inputs.requires_grad
        more = after.prompts.point_labels.shape[1] - before.prompts.point_labels.shape[1]
        assert more == int(after.new_click)
    assert passes[-1].prompts.point_labels.shape[1] == 10
    assert all(p.prediction.low_res_masks.requires_grad for p in passes)
    assert [asked for asked, _ in model.asked] == [p.prompts for p in passes]


def test_clicks_and_boxes_keep_their_layout_through_all_passes():
    passes, _ = run(PromptSimulator(), objects(40))
    is_box = passes[0].prompts.point_labels[:, 0] == BOX_TOP_LEFT
    assert 10 < is_box.sum() < 30

    for one in passes:
        labels = one.prompts.point_labels
        assert labels.dtype == torch.int64
        assert (labels[is_box, 0] == BOX_TOP_LEFT).all()
        assert (labels[is_box, 1] == BOX_BOTTOM_RIGHT).all()
        assert (labels[is_box] != PADDING).all()
        assert (labels[~is_box, -1] == PADDING).all()
        assert ((labels[~is_box, :-1] == FOREGROUND) | (labels[~is_box, :-1] == BACKGROUND)).all()
        if one.pass_index == 0:
            assert (labels[~is_box, 0] == FOREGROUND).all()


def test_earlier_points_stay_where_they_were():
    passes, _ = run(PromptSimulator(), objects(10))
    last = passes[-1].prompts
    for one in passes:
        for i in range(10):
            said = one.prompts.point_labels[i] != PADDING
            n = int(said.sum())
            assert torch.equal(one.prompts.point_coords[i, :n], last.point_coords[i, :n])
            assert torch.equal(one.prompts.point_labels[i, :n], last.point_labels[i, :n])


@pytest.mark.parametrize("sampling", ["uniform", "center"])
def test_corrections_lie_on_the_error_of_the_chosen_candidate(sampling):
    gt = objects(20)
    simulator = PromptSimulator(box_prob=0, num_extra_passes=0, click_sampling=sampling)
    passes, _ = run(simulator, gt)
    for before, after in zip(passes, passes[1:], strict=False):
        rows = torch.arange(20)
        pred = before.prediction.low_res_masks[rows, before.chosen] > 0
        x, y = after.prompts.point_coords[:, -2].long().unbind(1)
        assert (gt ^ pred)[rows, y, x].all()
        assert torch.equal(after.prompts.point_labels[:, -2], gt[rows, y, x].long())


def test_prompts_do_not_depend_on_what_else_is_in_the_batch():
    gt = objects(7)
    together, _ = run(PromptSimulator(), gt, PromptDraws.from_seeds([8, 9], [3, 4]))
    alone, _ = run(PromptSimulator(), gt[3:], PromptDraws.from_seeds([9], [4]))
    for both, one in zip(together, alone, strict=True):
        assert torch.equal(both.prompts.point_coords[3:], one.prompts.point_coords)
        assert torch.equal(both.prompts.point_labels[3:], one.prompts.point_labels)


def test_the_same_draws_and_plan_give_the_same_prompts_and_others_do_not():
    gt = objects(5)
    first, again = run(PromptSimulator(), gt)[0], run(PromptSimulator(), gt)[0]
    other, _ = run(PromptSimulator(), gt, PromptDraws.from_seeds([6], [5]))

    assert torch.equal(first[-1].prompts.point_coords, again[-1].prompts.point_coords)
    assert not torch.equal(first[-1].prompts.point_coords, other[-1].prompts.point_coords)


def test_box_noise_stays_within_its_limit_on_the_grid_and_is_there():
    n = 2000
    gt = torch.zeros(n, 256, 256, dtype=torch.bool)
    gt[:, 20:220, 40:200] = True
    draws = PromptDraws.from_seeds([0], [n])

    coords, labels, _ = PromptSimulator(box_prob=1).first_prompts(gt, None, draws)

    assert (labels == torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT])).all()
    shift = coords - torch.tensor([[40.0, 20.0], [200.0, 220.0]])
    # 20 px of a 1024 px input are 5 on a grid of 256.
    assert shift.abs().max() == 5
    assert shift.std() > 3


def test_without_noise_the_box_is_tight():
    gt = objects(3)
    simulator = PromptSimulator(box_prob=1, box_noise=0)
    coords, _, _ = simulator.first_prompts(gt, None, PromptDraws.from_seeds([0], [3]))
    for mask, ((x0, y0), (x1, y1)) in zip(gt, coords.long().tolist(), strict=True):
        assert mask.sum() == (x1 - x0) * (y1 - y0)
        assert mask[y0:y1, x0:x1].all()


def test_boxes_handed_over_are_used_instead_of_the_masks_own():
    boxes = torch.tensor([[1.0, 2.0, 20.0, 25.0]])
    simulator = PromptSimulator(box_prob=1, box_noise=0)
    prompts = simulator.first_prompts(objects(1), boxes, PromptDraws.from_seeds([0], [1]))

    assert prompts.point_coords.tolist() == [[[1.0, 2.0], [20.0, 25.0]]]


@pytest.mark.parametrize("sampling", ["uniform", "center"])
def test_empty_one_pixel_and_whole_objects_go_through_all_passes(sampling):
    gt = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    gt[1, 7, 9] = True
    gt[2] = True
    for box_prob in (0.0, 1.0):
        simulator = PromptSimulator(
            box_prob=box_prob, click_sampling=sampling, exclude_clicked=True
        )
        passes, _ = run(simulator, gt)
        assert len(passes) == 11
        first, last = passes[0].prompts, passes[-1].prompts
        # No box can be drawn round nothing: an empty object starts from a background click.
        assert first.point_labels[0].tolist() == [BACKGROUND, PADDING]
        assert torch.isfinite(last.point_coords).all()
        assert last.point_coords.min() >= 0
        assert last.point_coords.max() <= SIDE


def test_perfect_predictions_get_confirming_clicks():
    gt = objects(8)

    def perfect(prompts, multimask_output):
        logits = (gt.float() * 2 - 1)[:, None].repeat(1, 3 if multimask_output else 1, 1, 1)
        return MaskPrediction(logits, torch.ones(logits.shape[:2]))

    simulator = PromptSimulator(box_prob=0, num_extra_passes=0)
    plan = simulator.plan(torch.Generator())
    *_, last = simulator.rollout(perfect, gt, None, PromptDraws.from_seeds([1], [8]), plan)

    assert (last.prompts.point_labels[:, :-1] == FOREGROUND).all()
    x, y = last.prompts.point_coords[:, :-1].long().unbind(-1)
    assert gt[torch.arange(8)[:, None], y, x].all()


def test_excluded_pixels_are_never_clicked_twice():
    gt = objects(6)
    simulator = PromptSimulator(
        box_prob=0, click_sampling="center", exclude_clicked=True, num_extra_passes=0
    )
    stuck = MaskPrediction(torch.full((6, 1, SIDE, SIDE), -1.0), torch.ones(6, 1))
    plan = simulator.plan(torch.Generator())
    draws = PromptDraws.from_seeds([1], [6])
    *_, last = simulator.rollout(lambda *_: stuck, gt, None, draws, plan)
    allowed = dataclasses.replace(simulator, exclude_clicked=False)
    *_, repeated = allowed.rollout(lambda *_: stuck, gt, None, draws, plan)
    for i in range(6):
        assert len(last.prompts.point_coords[i, :-1].unique(dim=0)) == 9
        assert len(repeated.prompts.point_coords[i, :-1].unique(dim=0)) == 1


def test_a_share_of_corrections_is_drawn_from_the_whole_object():
    n = 4000
    gt = torch.zeros(n, 8, 8, dtype=torch.bool)
    gt[:, 2:6, 2:6] = True
    pred = gt.clone()
    pred[:, 2, 2] = False
    simulator = PromptSimulator(corrections_from_gt=0.1)

    draws = PromptDraws.from_seeds([0], [n]).for_pass(1)
    coords, labels = simulator.click(gt, pred, None, draws)

    on_error = (coords == 2).all(1).float().mean()
    assert on_error == pytest.approx(0.9 + 0.1 / 16, abs=0.02)
    assert (labels == FOREGROUND).all()


def test_answers_of_another_resolution_are_taken_to_the_grid_by_the_caller():
    gt = objects(4)
    asked = []

    def to_masks(logits):
        asked.append(logits.shape)
        return torch.zeros_like(gt)

    simulator = PromptSimulator(box_prob=0, num_corrections=2, num_extra_passes=0)
    passes, _ = run(simulator, gt, to_masks=to_masks)

    # As if nothing had ever been predicted: all clicks are foreground.
    assert asked == [(4, SIDE, SIDE)] * 2
    assert (passes[-1].prompts.point_labels[:, :-1] == FOREGROUND).all()


def test_a_batch_can_start_from_masks():
    gt = objects(3)
    simulator = PromptSimulator(mask_prob=1, num_corrections=1, num_extra_passes=0)
    passes, model = run(simulator, gt)

    first = passes[0].prompts
    assert torch.equal(first.mask_inputs[:, 0] > 0, gt)
    assert (first.point_labels == PADDING).all()
    assert passes[1].prompts.point_labels[:, 1:].eq(PADDING).all()
    assert (passes[1].prompts.point_labels[:, 0] >= 0).all()
    plans = [
        PromptSimulator(mask_prob=0.5).plan(torch.Generator().manual_seed(s)) for s in range(200)
    ]
    assert 60 < sum(plan.mask_first for plan in plans) < 140


def test_adding_clicks_puts_them_before_padding_and_after_corners():
    clicks = Clicks(torch.tensor([[7.0, 8.0]]), torch.tensor([0]))
    point = add_clicks(click_prompts(Clicks(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))), clicks)
    box = add_clicks(box_prompts(torch.tensor([[1.0, 2.0, 3.0, 4.0]])), clicks)

    assert point.point_labels.tolist() == [[1, 0, -1]]
    assert point.point_coords.tolist() == [[[1, 2], [7, 8], [0, 0]]]
    assert box.point_labels.tolist() == [[2, 3, 0]]
    assert box.point_coords.tolist() == [[[1, 2], [3, 4], [7, 8]]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"box_prob": 1.5}, r"box_prob is a probability in \[0, 1\], got 1.5"),
        ({"num_corrections": -1}, "num_corrections is 0 or more, got -1"),
        ({"click_sampling": "centre"}, "click_sampling is one of .*, got 'centre'"),
        ({"num_corrections": 0, "num_extra_passes": 2}, "one extra pass per correction"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PromptSimulator(**wrong)


def test_the_published_policies_are_configs_of_the_one_class():
    sam, sam2, medsam, clicks = (
        config.instantiate(OmegaConf.load(config.conf_dir() / "prompts" / f"{name}.yaml"))
        for name in ("sam", "sam2", "medsam", "clicks")
    )

    assert sam == PromptSimulator()
    assert (sam2.mask_prob, sam2.box_prob, sam2.corrections_from_gt) == (0.5, 0.5, 0.1)
    assert (sam2.num_corrections, sam2.num_extra_passes) == (7, 0)
    assert medsam.plan(torch.Generator()) == Plan((True,))
    assert clicks.num_corrections + 1 == 20
    assert (clicks.click_sampling, clicks.exclude_clicked) == ("center", True)


@pytest.mark.parametrize("corrected", [False, True])
def test_some_clicks_are_at_the_center(corrected: bool) -> None:
    gt_masks = objects(400)
    pred_masks = torch.zeros_like(gt_masks) if corrected else None
    draws = PromptDraws.from_seeds([3], [400])
    of_center, of_both = (
        PromptSimulator(center_prob=prob).click(gt_masks, pred_masks, None, draws.for_pass(0))
        for prob in (1.0, 0.3)
    )
    anywhere = PromptSimulator().click(gt_masks, pred_masks, None, draws.for_pass(0))

    expected = PromptSimulator(click_sampling="center").click(
        gt_masks, pred_masks, None, draws.for_pass(0)
    )
    assert torch.equal(of_center.coords, expected.coords)
    assert torch.equal(of_center.labels, expected.labels)
    is_center = (of_both.coords == expected.coords).all(dim=1)
    is_anywhere = (of_both.coords == anywhere.coords).all(dim=1)
    assert (is_center | is_anywhere).all()
    assert is_center.float().mean() == pytest.approx(0.3, abs=0.08)


def test_a_share_of_center_clicks_is_a_probability() -> None:
    with pytest.raises(ValueError, match="center_prob is a probability"):
        PromptSimulator(center_prob=1.5)


def test_no_center_is_looked_for_where_a_box_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []

    def counted(gt_masks: torch.Tensor, *arguments: object) -> Clicks:
        looked_at.append(len(gt_masks))
        return center_click(gt_masks, *arguments)

    center_click = simulator_module.center_click
    monkeypatch.setattr(simulator_module, "center_click", counted)
    draws = PromptDraws.from_seeds([3], [200])
    for settings in ({"center_prob": 1.0}, {"click_sampling": "center"}):
        prompts = PromptSimulator(box_prob=0.5, **settings).first_prompts(objects(200), None, draws)
        is_box = prompts.point_labels[:, 0] == BOX_TOP_LEFT
        assert looked_at.pop() == (~is_box).sum()
        assert 60 < is_box.sum() < 140


def test_the_columns_of_the_first_pass_are_those_of_recorded_runs() -> None:
    gt_masks, draws = objects(200), PromptDraws.from_seeds([3], [200])
    simulator = PromptSimulator(box_prob=0.35, center_prob=0.4)
    columns = draws.for_pass(0).uniform(
        7
    )  # the click, whether at the centre, four of the box, the kind

    prompts = simulator.first_prompts(gt_masks, None, draws)

    is_box = columns[:, 6] < 0.35
    assert torch.equal(prompts.point_labels[:, 0] == BOX_TOP_LEFT, is_box)
    at_center = PromptSimulator(click_sampling="center").click(
        gt_masks, None, None, draws.for_pass(0)
    )
    is_center = (prompts.point_coords[:, 0] == at_center.coords).all(dim=1)
    assert is_center[~is_box & (columns[:, 1] < 0.4)].all()
    anywhere = uniform_click(gt_masks, None, columns[:, 0]).coords
    is_anywhere = (prompts.point_coords[:, 0] == anywhere).all(dim=1)
    assert is_anywhere[~is_box & (columns[:, 1] >= 0.4)].all()
