from collections import Counter
from itertools import islice

import pytest

from sam_train.data.datamodule import SamDataModule
from sam_train.data.mixture import BySource, MixtureSource, last_epoch
from sam_train.data.sa1b import ShardSource
from sam_train.data.source import HeldOut, UnusableSourceError
from sam_train.data.transforms import ToSample
from sam_train.data.val_choice import hold_out


@pytest.fixture
def source(tmp_path, make):
    """Builds a source of so many samples."""

    def build(name, count, /, **settings):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if not list(folder.iterdir()):
            make.shards(folder, [count])
        return ShardSource(path=str(folder), **settings)

    return build


def stream(mixture, *, reader=0, num_readers=1, start=(), shuffle=True, epoch=0):
    return mixture.records(
        epoch=epoch, reader=reader, num_readers=num_readers, shuffle=shuffle, start=start
    )


def keys(records, count):
    return [record.key for record in islice(records, count)]


def test_shares_follow_the_weights(source):
    mixture = MixtureSource(
        sources={"a": source("a", 5), "b": source("b", 50), "never": source("c", 3)},
        weights={"a": 3, "b": 1, "never": 0},
    )
    drawn = Counter(record.source for record in islice(stream(mixture), 2000))
    assert set(drawn) == {"a", "b"}
    assert drawn["a"] / 2000 == pytest.approx(0.75, abs=0.03)


def test_each_source_is_gone_through_before_it_comes_again(source):
    mixture = MixtureSource(sources={"a": source("a", 7), "b": source("b", 3)})
    of_a = [record for record in islice(stream(mixture), 100) if record.source == "a"]
    for number in range(3):
        once = of_a[7 * number : 7 * number + 7]
        assert len({record.key for record in once}) == 7
        assert {record.epoch for record in once} == {number}
    assert [r.key for r in of_a[:7]] != [r.key for r in of_a[7:14]], "each pass in another order"


def test_keys_tell_sources_apart(source):
    mixture = MixtureSource(sources={"a": source("a", 2), "b": source("b", 2)})
    assert set(keys(stream(mixture), 50)) == {
        f"{name}/s0_{number}" for name in "ab" for number in range(2)
    }


@pytest.mark.parametrize("num_readers", [1, 3])
@pytest.mark.parametrize("at", [1, 2, 17, 40])
def test_a_stream_goes_on_exactly_from_any_cursor(source, num_readers, at):
    mixture = MixtureSource(
        sources={"a": source("a", 7), "b": source("b", 4)}, weights={"a": 2, "b": 1}, seed=3
    )
    for reader in range(num_readers):
        whole = list(islice(stream(mixture, reader=reader, num_readers=num_readers), 60))
        resumed = stream(
            mixture, reader=reader, num_readers=num_readers, start=whole[at - 1].cursor
        )
        rest = list(islice(resumed, 60 - at))
        assert [(r.key, r.epoch) for r in rest] == [(r.key, r.epoch) for r in whole[at:]]
        assert [r.cursor for r in rest] == [r.cursor for r in whole[at:]]


@pytest.mark.parametrize(
    ("cursor", "epoch"),
    [
        ((), 5),
        ((7,), 5),
        ((7, 7, 0), 5),
        (((0, 512, 3), 2, 9, 0), 5),
        ((9, (0, ()), (0, (3, 3, 0))), 5),
        ((9, (2, ()), (1, ((0, 512, 3), 2, 9, 0))), 7),
        ([9, [0, []], [1, [4, [3, [1, 1, 0]], [2, []]]]], 9),
    ],
)
def test_the_furthest_epoch_is_that_of_the_source_gone_through_most_often(cursor, epoch):
    assert last_epoch(5, cursor) == epoch


def test_readers_draw_differently_and_share_each_source(source):
    mixture = MixtureSource(sources={"a": source("a", 6), "b": source("b", 6)})
    streams = [list(islice(stream(mixture, reader=r, num_readers=2), 40)) for r in range(2)]
    first_pass = [{r.key for r in one if r.epoch == 0} for one in streams]
    assert not first_pass[0] & first_pass[1]
    assert len(first_pass[0] | first_pass[1]) == 12
    assert [r.source for r in streams[0]] != [r.source for r in streams[1]]


def test_unshuffled_all_sources_come_once_in_turn_and_go_on_from_a_cursor(source):
    mixture = MixtureSource(sources={"a": source("a", 3), "b": source("b", 2)})
    whole = list(stream(mixture, shuffle=False))
    assert [r.key for r in whole] == ["a/s0_0", "a/s0_1", "a/s0_2", "b/s0_0", "b/s0_1"]
    for at in range(1, 5):
        rest = stream(mixture, shuffle=False, start=whole[at - 1].cursor)
        assert [r.key for r in rest] == [r.key for r in whole[at:]]


def test_a_source_without_images_for_a_reader_is_an_error_not_a_wait(source):
    mixture = MixtureSource(sources={"a": source("a", 5), "few": source("b", 1)})
    with pytest.raises(UnusableSourceError, match="reader 2 of 2 found no image in few"):
        keys(stream(mixture, reader=1, num_readers=2), 50)


@pytest.mark.parametrize("weights", [{"a": 1}, {"a": 1, "b": -1}, {"a": 0, "b": 0}])
def test_impossible_weights_are_refused(source, weights):
    with pytest.raises(ValueError, match="weight"):
        MixtureSource(sources={"a": source("a", 1), "b": source("b", 1)}, weights=weights)


def test_a_source_may_have_settings_of_its_own(source):
    few, many = (ToSample(img_size=32, mask_size=16, max_masks=count) for count in (1, 9))
    transform = BySource(default=many, sources={"a": few})
    assert (transform.img_size, transform.max_masks) == (32, 9)
    record = next(stream(MixtureSource(sources={"a": source("a", 1)})))
    assert transform(record, 0).masks.shape == (1, 16, 16)
    with pytest.raises(ValueError, match="alike"):
        BySource(default=many, sources={"a": ToSample(img_size=64, mask_size=16)})


def test_each_set_without_images_to_validate_on_holds_out_its_own(source, caplog):
    a, b = source("a", 60, name="a"), source("b", 5, name="b")
    train = MixtureSource(sources={"a": a, "b": b})
    val = MixtureSource(sources={"a": a, "b": source("c", 4, name="b")})

    trained, validated = hold_out(train, val)

    assert isinstance(trained.sources["a"], HeldOut) and trained.sources["b"] is b
    both = [{r.key for r in stream(one, shuffle=False)} for one in (trained, validated)]
    assert not {k for k in both[0] & both[1] if k.startswith("a/")}
    assert len({k for k in both[0] | both[1] if k.startswith("a/")}) == 60
    assert "no other images of a" in caplog.text


def test_validation_is_told_apart_by_source(source):
    mixture = MixtureSource(sources={"a": source("a", 4), "b": source("b", 4)})
    data = SamDataModule(
        train=mixture,
        val=MixtureSource(sources={"a": source("c", 4), "b": source("d", 4)}),
        train_transform=ToSample(img_size=32, mask_size=16, max_masks=4),
        batch_size=1,
        max_val_masks=4,
    )
    data.setup("fit")
    assert data.val_sources == ("a", "b")
    assert Counter(record.source for record in data.val_dataloader()) == {"a": 2, "b": 2}
