"""Prompts divided into shards: contiguous ranges, each complete before the next is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backlens.errors import BacklensError
from backlens.prompts.prompt import Prompt, shards


@given(st.integers(0, 40), st.integers(1, 12))
def test_shards_are_contiguous_ranges_of_the_given_size(count: int, size: int):
    records = [Prompt(number, "a", "b", "x") for number in range(count)]
    cut = list(shards(iter(records), size))
    assert [shard.index for shard in cut] == list(range(-(-count // size)))
    assert [record.prompt_id for shard in cut for record in shard.records] == list(range(count))
    assert all(len(shard.records) == size for shard in cut[:-1])


def test_a_shard_is_cut_before_the_next_is_read():
    taken = []

    def records():
        for number in range(1000):
            taken.append(number)
            yield Prompt(number, "a", "b", "x")

    next(shards(records(), 5))
    assert taken == [0, 1, 2, 3, 4]


def test_a_shard_of_no_prompts_is_refused():
    with pytest.raises(BacklensError, match="--shard-prompts 0"):
        shards(iter([]), 0)
