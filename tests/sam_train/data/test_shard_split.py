"""A training that reads the same shards again and again says so."""

import pytest

from sam_train.data.mixture import MixtureSource
from sam_train.data.sa1b import ShardSource
from sam_train.data.shard_split import warn_of_rereading
from sam_train.data.source import HeldOut


@pytest.fixture
def large(tmp_path):
    """Ten sparse shards of 1 GB, held out of, in a mixture."""
    for number in range(10):
        with (tmp_path / f"{number}.tar").open("wb") as file:
            file.truncate(10**9)
    shards = HeldOut(source=ShardSource(path=str(tmp_path), name="big"), share=0.1, keep="rest")
    return MixtureSource(sources={"big": shards})


def test_shards_that_do_not_divide_among_the_readers_are_read_by_each_and_that_is_said(
    large, caplog
):
    warn_of_rereading(large, 16)
    assert "big: its 10 shards do not divide among 16 readers" in caplog.text
    assert "150 GB more an epoch" in caplog.text and "from 128 shards on" in caplog.text


@pytest.mark.parametrize("num_readers", [1, 2, 10, 3])
def test_nothing_is_said_where_each_reads_its_own_or_it_is_little(large, caplog, num_readers):
    warn_of_rereading(large, num_readers)
    assert caplog.text == ""
