"""Batches are full, and little of them is padding."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.packing import WASTE, pack


@given(st.lists(st.integers(1, 300), max_size=200), st.integers(1, 4000))
def test_every_prompt_is_in_one_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = pack(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


@given(st.lists(st.integers(1, 300), min_size=1, max_size=300), st.integers(600, 4000))
def test_a_batch_above_an_eighth_of_the_budget_is_a_tenth_padding_at_most(
    lengths: list[int], budget: int
) -> None:
    for batch in pack(lengths, budget):
        own = [lengths[i] for i in batch]
        padded = max(own) * len(own)
        if len(own) > 1 and max(own[:-1]) * (len(own) - 1) > budget // 8:
            assert padded - sum(own) <= WASTE * padded


def test_prompts_of_one_length_fill_their_batches() -> None:
    assert [len(batch) for batch in pack([10] * 1000, 2000)] == [200] * 5
