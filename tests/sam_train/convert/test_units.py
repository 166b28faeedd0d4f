"""Sources in pieces."""

import numpy as np
import pytest

from sam_train.convert.units import count_units, kept_share, tolerant
from sam_train.data.indexed import IndexedSource
from sam_train.data.listed import ListedSource
from sam_train.data.sa1b import ShardSource, splits_by_shard
from sam_train.data.source import HeldOut
from sam_train.structures import ImageRecord


class Numbers:
    """Twenty images, of which one is damaged."""

    def __len__(self):
        return 20

    def describe(self, index):
        return str(index)

    def record(self, index):
        if index == 7:
            raise ValueError("no image")
        return ImageRecord(self.describe(index), (4, 4), (), lambda: np.zeros((4, 4, 3), np.uint8))


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "list.csv").write_text("key,use\n1,yes\n2,no\n")
    source = IndexedSource(items=Numbers(), max_bad_fraction=0)
    return ListedSource(
        source=source, list=str(tmp_path / "list.csv"), column="use", allowed=["yes"]
    )


def test_a_listed_source_is_as_tolerant_and_as_large_as_what_it_lists(listed):
    assert count_units(listed, 5) == 4
    held_out = HeldOut(source=listed, share=0.25, keep="rest")
    assert count_units(held_out, 5) == 3 and kept_share(held_out) == 0.75
    records = tolerant(listed).records(epoch=0, reader=0, num_readers=1, shuffle=False)
    assert [record.key for record in records] == ["1"]


@pytest.mark.parametrize("keep", ["rest", "held_out"])
def test_each_shard_is_read_by_one_unit_where_a_share_is_held_out(make, tmp_path, keep):
    make.shards(tmp_path, [1] * 7)
    source = ShardSource(path=str(tmp_path))
    held_out = HeldOut(source=HeldOut(source=source, share=0.1, keep="rest"), share=0.2, keep=keep)
    assert splits_by_shard(7, count_units(held_out, 5))
