import math

import pytest
import torch

from sam_train.metrics.clicks import ClickCurves, ClickMetrics, number_of_clicks, size_class

NAN = math.nan


def curves(ious, predicted=None, oracle=None, box=None, areas=None) -> ClickCurves:
    ious = torch.tensor(ious)
    n = len(ious)
    return ClickCurves(
        ious=ious,
        predicted_ious=ious.clone() if predicted is None else torch.tensor(predicted),
        oracle_ious=torch.tensor(oracle or [NAN] * n),
        box_ious=torch.tensor(box or [NAN] * n),
        areas=torch.tensor(areas or [10] * n),
        objects=torch.arange(n),
    )


def twenty(*start: float, then: float) -> list[float]:
    return [*start, *[then] * (20 - len(start))]


def test_worked_by_hand():
    metrics = ClickMetrics(20)
    metrics.update(
        curves(
            [
                twenty(0.2, 0.86, 0.91, 0.95, then=0.95),  # noc 2 and 3
                twenty(0.6, then=0.7),  # neither
            ],
            predicted=[twenty(0.4, 0.86, 0.91, 0.95, then=0.95), twenty(0.6, then=0.61)],
            oracle=[0.5, 0.6],
            box=[0.9, 0.8],
            areas=[1023, 9216],
        )
    )
    # An object of medium size that only the eleventh click gets to 0.85 and none to 0.90.
    metrics.update(curves([[*[0.3] * 10, *[0.85] * 10]], oracle=[0.4], box=[1.0], areas=[1024]))
    values = metrics.compute()

    assert metrics.num_masks == 3
    assert values["mean_iou@1"] == pytest.approx((0.2 + 0.6 + 0.3) / 3)
    assert values["mean_iou@2"] == pytest.approx((0.86 + 0.7 + 0.3) / 3)
    assert values["mean_iou@9"] == pytest.approx((0.95 + 0.7 + 0.3) / 3)
    assert "mean_iou@10" not in values
    assert values["oracle_mean_iou@1"] == pytest.approx(0.5)
    assert values["box_mean_iou"] == pytest.approx(0.9)
    assert values["noc@85"] == pytest.approx((2 + 20 + 11) / 3)
    assert values["noc@90"] == pytest.approx((3 + 20 + 20) / 3)
    assert values["failures@90"] == pytest.approx(2 / 3)
    # 0.2 off once in nine clicks; 0.09 off in eight of nine; never.
    assert values["iou_prediction_mae"] == pytest.approx((0.2 / 9 + 0.09 * 8 / 9) / 3, abs=1e-6)
    assert values["mean_iou@1_small"] == pytest.approx(0.2)
    assert values["noc@85_medium"] == 11
    assert values["box_mean_iou_large"] == pytest.approx(0.8)
    assert values["failures@90_small"] == 0
    assert values["failures@90_large"] == 1


def test_an_object_that_was_finished_early_counts_with_the_clicks_it_took():
    metrics = ClickMetrics(20)
    metrics.update(curves([[*[0.5] * 8, 0.92, *[NAN] * 11]]))

    assert metrics.compute()["noc@90"] == 9
    assert metrics.compute()["failures@90"] == 0


def test_reaching_the_target_exactly_counts_and_falling_back_does_not_matter():
    assert number_of_clicks(torch.tensor([[0.5, 0.9, 0.1, NAN]]), 0.9).tolist() == [2]
    assert number_of_clicks(torch.tensor([[0.5, 0.85, 0.1, NAN]]), 0.85).tolist() == [2]
    assert number_of_clicks(torch.tensor([[0.5, 0.89, 0.1, NAN]]), 0.9).tolist() == [20]


@pytest.mark.parametrize(
    ("area", "size"), [(1, 0), (1023, 0), (1024, 1), (9215, 1), (9216, 2), (10**7, 2)]
)
def test_sizes_are_cocos(area, size):
    assert size_class(torch.tensor([area])).tolist() == [size]


def test_short_runs_leave_out_what_needs_twenty_clicks():
    metrics = ClickMetrics(3)
    metrics.update(curves([[0.1, 0.2, 0.3]], oracle=[0.2], box=[0.4], areas=[5000]))

    assert set(metrics.compute()) == {
        name + suffix
        for suffix in ("", "_medium")
        for name in (
            "mean_iou@1",
            "mean_iou@2",
            "mean_iou@3",
            "oracle_mean_iou@1",
            "box_mean_iou",
            "iou_prediction_mae",
        )
    }


def test_boxes_that_were_not_asked_for_are_left_out():
    metrics = ClickMetrics(1)
    metrics.update(curves([[0.5]], oracle=[0.5]))

    assert "box_mean_iou" not in metrics.compute()


def random_curves(n: int, seed: int) -> ClickCurves:
    generator = torch.Generator().manual_seed(seed)
    ious, predicted = torch.rand(2, n, 20, generator=generator)
    oracle, box = torch.rand(2, n, generator=generator)
    areas = torch.randint(1, 20_000, (n,), generator=generator)
    return ClickCurves(ious, predicted, oracle, box, areas, torch.arange(n))


def test_means_are_over_masks_however_they_are_dealt_to_images_and_ranks():
    whole, ranks = ClickMetrics(20), [ClickMetrics(20), ClickMetrics(20)]
    images = [random_curves(n, seed) for seed, n in enumerate((1, 7, 30, 0))]
    for i, image in enumerate(images):
        ranks[i % 2].update(image)
    whole.update(ClickCurves(*(torch.cat(parts) for parts in zip(*images, strict=True))))

    by_addition = ClickMetrics(20)
    by_addition.totals = ranks[0].totals + ranks[1].totals
    ranks[0].merge(ranks[1])

    assert ranks[0].num_masks == 38
    assert ranks[0].compute() == pytest.approx(whole.compute())
    assert by_addition.compute() == ranks[0].compute()


def test_only_metrics_of_one_protocol_merge():
    with pytest.raises(ValueError, match="same protocol"):
        ClickMetrics(20).merge(ClickMetrics(3))
    with pytest.raises(ValueError, match="num_clicks is 1 or more, got 0"):
        ClickMetrics(0)
