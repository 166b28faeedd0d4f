import pytest
import torch
from scipy import stats

from sam_train.prompts.draws import PromptDraws


def test_an_image_draws_the_same_whatever_else_is_in_the_batch():
    together = PromptDraws.from_seeds([11, 22, 33], [2, 3, 1])
    alone = PromptDraws.from_seeds([22], [3])
    shuffled = PromptDraws.from_seeds([33, 22], [1, 3])

    for index in (0, 7):
        expected = alone.for_pass(index).uniform(5)
        assert torch.equal(together.for_pass(index).uniform(5)[2:5], expected)
        assert torch.equal(shuffled.for_pass(index).uniform(5)[1:], expected)


def test_a_mask_draws_the_same_however_many_masks_follow_it_in_its_image():
    few, many = PromptDraws.from_seeds([5], [2]), PromptDraws.from_seeds([5], [40])

    assert torch.equal(few.for_pass(1).uniform(3), many.for_pass(1).uniform(3)[:2])


def test_masks_images_passes_and_calls_all_differ():
    draws = PromptDraws.from_seeds([0, 1, 2**64 - 1], [3, 3, 3])
    numbers = []
    for index in range(4):
        one_pass = draws.for_pass(index)
        numbers += [one_pass.uniform(2), one_pass.uniform(1)]
    numbers = torch.cat(numbers, dim=1)

    assert numbers.unique().numel() == numbers.numel()


def test_calls_go_on_where_the_one_before_stopped():
    draws = PromptDraws.from_seeds([3], [4])
    split = draws.for_pass(2)

    assert torch.equal(
        torch.cat([split.uniform(2), split.uniform(3)], dim=1), draws.for_pass(2).uniform(5)
    )


def test_uniform_numbers_are_uniform_and_uncorrelated():
    numbers = PromptDraws.from_seeds([9, 10], [10_000, 10_000]).for_pass(0).uniform(2)

    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers[:, 0].numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(numbers[:, 1].numpy(), "uniform").pvalue > 0.01
    assert abs(stats.pearsonr(numbers[:-1, 0], numbers[1:, 0]).statistic) < 0.02
    assert abs(stats.pearsonr(numbers[:, 0], numbers[:, 1]).statistic) < 0.02


def test_normal_numbers_are_standard_normal():
    numbers = PromptDraws.from_seeds([4], [20_000]).for_pass(0).normal(1)

    assert torch.isfinite(numbers).all()
    assert stats.kstest(numbers[:, 0].numpy(), "norm").pvalue > 0.01


def test_a_generator_of_the_same_state_gives_the_same_draws():
    first, again = (
        PromptDraws.from_generator(torch.Generator().manual_seed(seed), [2, 3]) for seed in (6, 6)
    )
    other = PromptDraws.from_generator(torch.Generator().manual_seed(7), [2, 3])

    assert torch.equal(first.for_pass(0).uniform(4), again.for_pass(0).uniform(4))
    assert not torch.equal(first.for_pass(0).uniform(4), other.for_pass(0).uniform(4))


def test_selected_masks_keep_their_numbers():
    draws = PromptDraws.from_seeds([1, 2], [3, 3])
    rows = torch.tensor([False, True, False, False, False, True])

    assert torch.equal(
        draws.select(rows).for_pass(3).uniform(2), draws.for_pass(3).uniform(2)[[1, 5]]
    )


def test_seeds_and_counts_must_match():
    with pytest.raises(ValueError, match="a seed per image, got 2 for 1 images"):
        PromptDraws.from_seeds([1, 2], [3])


def test_variants_draw_other_numbers_for_the_same_masks() -> None:
    draws = PromptDraws.from_seeds([5, 6], [2, 1])
    numbers = [draws.for_pass(0).uniform(2)]
    numbers += [draws.variant(i).for_pass(0).uniform(2) for i in range(3)]
    assert len(torch.unique(torch.cat(numbers))) == 4 * 3 * 2
    assert torch.equal(draws.variant(1).for_pass(0).uniform(2), numbers[2])
    alone = PromptDraws.from_seeds([6], [1]).variant(1).for_pass(0).uniform(2)
    assert torch.equal(alone, numbers[2][2:]), "whatever else is in the batch"
