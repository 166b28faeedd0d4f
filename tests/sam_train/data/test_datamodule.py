import itertools
import logging
from collections import Counter

import numpy as np
import pytest
import torch

from sam_train.data import sa1b, tar_samples
from sam_train.data.augment import ColourJitter, Flips
from sam_train.data.crops import LargeScaleJitter
from sam_train.data.datamodule import SamDataModule, from_paths
from sam_train.data.mixture import MixtureSource
from sam_train.data.sa1b import ShardSource
from sam_train.data.source import UnusableSourceError
from sam_train.data.transforms import ToSample

CPU = torch.device("cpu")


class Ranked(SamDataModule):
    """A data module that believes to be one process of several."""

    def __init__(self, rank=0, world_size=1, **settings):
        super().__init__(**settings)
        self.place = rank, world_size

    def _rank(self):
        return self.place[0]

    def _world_size(self):
        return self.place[1]


@pytest.fixture
def module(tmp_path, make):
    """Builds data modules over two training shards of 6 and 7 images, or other counts."""

    def build(counts=(6, 7), rank=0, world_size=1, **settings):
        for part, sizes in (("train", list(counts)), ("val", [5])):
            (tmp_path / part).mkdir(exist_ok=True)
            if not list((tmp_path / part).iterdir()):
                make.shards(tmp_path / part, sizes)
        defaults = {
            "train": ShardSource(path=str(tmp_path / "train"), seed=1),
            "val": ShardSource(path=str(tmp_path / "val")),
            "train_transform": ToSample(img_size=32, mask_size=16, max_masks=4),
            "batch_size": 3,
        }
        return Ranked(rank, world_size, **defaults | settings)

    return build


def used(data, count):
    """The next batches as Lightning would hand them to training: one more is fetched than used."""
    loader = iter(data.train_dataloader())
    ahead = next(loader)
    batches = []
    for _ in range(count):
        batch, ahead = ahead, next(loader)
        batches.append(data.transfer_batch_to_device(batch, CPU, 0))
    return batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_epoch_of_all_processes_holds_every_sample_once(module, num_workers):
    counts = Counter()
    for rank in range(2):
        data = module(counts=(6, 6), rank=rank, world_size=2, num_workers=num_workers, batch_size=3)
        for batch in used(data, 6 // 3 * 2):  # two epochs of the 6 samples of a process
            counts.update(batch.keys)
    assert len(counts) == 12 and set(counts.values()) == {2}


def test_batches_straddle_epochs_so_that_none_is_short(module):
    batches = used(module(), 20)
    assert {len(batch.keys) for batch in batches} == {3}
    assert {batch.images.shape for batch in batches} == {(3, 3, 32, 32)}


def test_draws_are_keyed_by_sample_not_by_process(module):
    settings = {
        "train_transform": ToSample(
            img_size=32,
            mask_size=16,
            crop=LargeScaleJitter(scale=(0.5, 1.5)),
            flips=Flips(),
            colour=ColourJitter(),
        )
    }

    def images(world_size):
        found = {}
        for rank in range(world_size):
            data = module(rank=rank, world_size=world_size, batch_size=1, **settings)
            for batch in used(data, 13 // world_size):
                found[batch.keys[0]] = (batch.seeds[0], batch.images.sum().item())
        return found

    alone, together = images(1), images(3)
    assert len(together) == 12
    assert all(alone[key] == drawn for key, drawn in together.items())


def test_processes_together_make_the_batch_of_a_single_one(module):
    alone = used(module(counts=(13,), batch_size=4), 1)[0]
    parts = [
        used(module(counts=(13,), rank=rank, world_size=2, batch_size=2), 1)[0] for rank in (0, 1)
    ]
    assert sorted(alone.seeds) == sorted(parts[0].seeds + parts[1].seeds)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_used", [1, 7])
def test_a_resumed_stream_goes_on_with_the_next_batch(module, num_workers, num_used):
    whole = used(module(num_workers=num_workers), num_used + 5)
    first = module(num_workers=num_workers)
    used(first, num_used)

    resumed = module(num_workers=num_workers)
    resumed.load_state_dict(first.state_dict())

    rest = used(resumed, 5)
    assert [batch.seeds for batch in rest] == [batch.seeds for batch in whole[num_used:]]
    assert all(
        torch.equal(one.images, other.images)
        for one, other in zip(rest, whole[num_used:], strict=True)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_is_begun_again_goes_on_with_the_next_batch(module, num_workers):
    whole = used(module(num_workers=num_workers), 9)
    data = module(num_workers=num_workers)
    loader = data.train_dataloader()
    seeds = []
    for _ in range(3):  # as Lightning does, with one fetched ahead
        batches = iter(loader)
        ahead = next(batches)
        for _ in range(3):
            batch, ahead = ahead, next(batches)
            seeds.append(data.transfer_batch_to_device(batch, CPU, 0).seeds)
    assert seeds == [batch.seeds for batch in whole]


def test_with_other_readers_it_goes_on_with_the_next_epoch(module, caplog):
    first = module()
    used(first, 6)
    resumed = module(num_workers=2)
    resumed.load_state_dict(first.state_dict())
    assert resumed.state_dict()["readers"] == [(2, ()), (2, ())]
    assert "readers has changed" in caplog.text


def test_a_mixture_with_other_readers_repeats_no_draw_of_a_pass_that_it_made(
    module, tmp_path, make
):
    sources = {}
    for name, count in (("a", 4), ("b", 40)):
        (tmp_path / name).mkdir()
        make.shards(tmp_path / name, [count])
        sources[name] = ShardSource(path=str(tmp_path / name))
    settings = {"train": MixtureSource(sources=sources), "batch_size": 1}
    first = module(**settings)
    before = [seed for batch in used(first, 30) for seed in batch.seeds]

    resumed = module(num_workers=2, **settings)
    resumed.load_state_dict(first.state_dict())
    after = [seed for batch in used(resumed, 30) for seed in batch.seeds]

    (epoch, _), *_ = resumed.state_dict()["readers"]
    assert epoch >= 3, "a was gone through several times"
    assert not set(before) & set(after)


def test_with_a_shard_less_it_goes_on_with_the_next_epoch_and_says_so(module, tmp_path, caplog):
    first = module(counts=(6, 6, 6))
    used(first, 3)
    state = first.state_dict()
    (tmp_path / "train" / "part-000001.tar").unlink()
    assert first.state_dict() == state, "a checkpoint is written all the same"

    resumed = module(counts=(6,))
    resumed.load_state_dict(state)

    assert resumed.state_dict()["readers"] == [(1, ())]
    assert "the data's files are not those of before" in caplog.text
    assert "going on at the start of epoch 1" in caplog.text


def test_resuming_reads_no_more_than_the_window_that_was_open(module, tmp_path, make, monkeypatch):
    (tmp_path / "many").mkdir()
    make.shards(tmp_path / "many", [4] * 12)
    settings = {
        "train": ShardSource(path=str(tmp_path / "many"), shuffle_buffer_mb=0.001),
        "batch_size": 2,
    }
    opened = []
    original = tar_samples.read_samples

    def counting(url, is_wanted, start=0):
        opened.append((url, start))
        return original(url, is_wanted, start)

    monkeypatch.setattr(sa1b, "read_samples", counting)
    first = module(**settings)
    whole = used(module(**settings), 20)
    used(first, 17)
    opened.clear()
    resumed = module(**settings)
    resumed.load_state_dict(first.state_dict())

    rest = used(resumed, 1)

    assert [batch.keys for batch in rest] == [batch.keys for batch in whole[17:18]]
    assert len(opened) <= 3 and opened[0][1] > 0, "of the 9 shards that came before, none"
    assert len({url for url, _ in opened}) == len(opened), "none twice"


def test_more_readers_than_images_is_an_error_not_a_wait(module):
    data = module(counts=(1,), rank=1, world_size=2)
    with pytest.raises(UnusableSourceError, match="fewer images than readers"):
        next(iter(data.train_dataloader()))


def test_what_a_worker_finds_wrong_arrives_without_its_traceback(module):
    data = module(
        counts=(1,),
        num_workers=1,
        train_transform=ToSample(img_size=32, mask_size=16, max_masks=4, max_area_fraction=0.001),
    )
    with pytest.raises(UnusableSourceError, match=r"^reader 1 of 1 found no image") as raised:
        next(iter(data.train_dataloader()))
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_set_is_named_before_training_starts(module, tmp_path, missing):
    data = module(**{missing: ShardSource(path=str(tmp_path / "nowhere.tar"))})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.setup("fit")


def crowded(make, tmp_path):
    """A shard of 6 images with 20 masks each."""
    rng = np.random.default_rng(0)
    files = {}
    for index in range(6):
        masks = np.zeros((20, 24, 24), bool)
        for mask, (y, x) in zip(masks, rng.integers(0, 20, (20, 2)), strict=True):
            mask[y : y + 4, x : x + 4] = True
        files |= make.files(make.record(f"c{index}", masks))
    make.tar(tmp_path / "crowded.tar", files)
    return ShardSource(path=str(tmp_path / "crowded.tar"))


def ids(records):
    return sorted((record.key, one.id) for record in records for one in record.annotations)


def test_validation_takes_the_same_masks_every_time_and_on_any_number_of_processes(
    module, make, tmp_path
):
    settings = {"val": crowded(make, tmp_path), "max_val_masks": 18, "max_val_masks_per_image": 5}
    alone = module(**settings)

    chosen = ids(alone.val_dataloader())

    assert len(chosen) == 18 and len({key for key, _ in chosen}) == 4
    assert ids(alone.val_dataloader()) == chosen == ids(module(**settings).val_dataloader())
    shares = [
        ids(module(rank=rank, world_size=3, **settings).val_dataloader()) for rank in range(3)
    ]
    assert sorted(itertools.chain(*shares)) == chosen
    assert ids(module(**settings, val_seed=1).val_dataloader()) != chosen
    assert ids(module(**settings, seed=1).val_dataloader()) == chosen


def test_without_a_limit_all_of_validation_is_shared_out(module, make, tmp_path):
    settings = {"val": crowded(make, tmp_path), "max_val_masks": None}
    shares = [list(module(rank=r, world_size=4, **settings).val_dataloader()) for r in range(4)]
    assert len(ids(itertools.chain(*shares))) == len(set(ids(itertools.chain(*shares)))) == 120


def test_a_tenth_is_held_out_where_nothing_else_is_given(module, make, tmp_path, caplog):
    make.shards(tmp_path, [60])
    settings = {
        "train": ShardSource(path=str(tmp_path), cache_mb=1, seed=4),
        "val": ShardSource(path=str(tmp_path)),
        "train_transform": ToSample(img_size=32, mask_size=16, max_masks=4),
        "batch_size": 1,
    }
    data = from_paths(path=str(tmp_path), val_path=str(tmp_path), **settings)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")

    validated = {record.key for record in data.val_dataloader()}
    trained = {key for batch in used(data, 60 - len(validated)) for key in batch.keys}

    assert "held out" in caplog.text and 1 <= len(validated) <= 15
    assert len(trained) == 60 - len(validated) and not trained & validated


def test_a_record_is_left_as_it_is_on_the_way_to_the_device(module):
    data = module()
    record = next(iter(data.val_dataloader()))
    assert data.transfer_batch_to_device(record, CPU, 0) is record


@pytest.mark.parametrize(
    "settings", [{"max_masks_per_batch": 3}, {"batch_size": 0}, {"num_workers": -1}]
)
def test_impossible_settings_are_refused(module, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        module(**settings)
