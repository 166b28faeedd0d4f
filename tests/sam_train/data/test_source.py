import pytest

from sam_train.data.source import DamageTally, HeldOut, UnusableSourceError, sample_seed


class Keys:
    """A source of records that are nothing but their keys."""

    def __init__(self, make):
        self.all = [make.square(f"k{index}") for index in range(300)]

    def records(self, *, epoch, reader, num_readers, shuffle, start=()):
        return iter(self.all[reader::num_readers])


def test_a_sample_seed_is_fixed_for_ever_and_differs_by_each_part():
    assert sample_seed(0, 0, "a") == 5050641589276093629
    seeds = {sample_seed(seed, epoch, key) for seed in (0, 1) for epoch in (0, 1) for key in "ab"}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_held_out_and_rest_are_everything_once(make):
    source = Keys(make)
    both = [
        [
            record.key
            for reader in range(2)
            for record in HeldOut(source=source, share=0.2, keep=keep).records(
                epoch=0, reader=reader, num_readers=2, shuffle=False
            )
        ]
        for keep in ("held_out", "rest")
    ]
    assert sorted(both[0] + both[1]) == sorted(record.key for record in source.all)
    assert 30 <= len(both[0]) <= 90


def test_an_unknown_part_is_refused(make):
    with pytest.raises(ValueError, match="'held_out' or 'rest'"):
        HeldOut(source=Keys(make), share=0.5, keep="val")


def test_early_damage_is_not_judged_by_the_first_few_samples():
    tally = DamageTally("mine", 0.05)
    for _ in range(5):
        tally.seen += 1
        tally.damaged("a", "broken")
    with pytest.raises(UnusableSourceError, match=r"6 of 6 .*a, a, a, a, a, \.\.\."):
        tally.seen += 1
        tally.damaged("a", "broken")


def test_a_whole_pass_is_judged_by_its_own_length():
    tally = DamageTally("mine", 0.05, seen=10)
    tally.damaged("a", "broken")
    with pytest.raises(UnusableSourceError, match="1 of 10"):
        tally.finish()
