"""Batches are full, little of them is padding, and one that failed comes back."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from backlens.capture.packing import Packer, TokenBudget, pack

LENGTHS = st.lists(st.integers(1, 300), max_size=200)


@given(LENGTHS, st.integers(1, 4000))
def test_every_prompt_is_in_one_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = pack(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


@given(LENGTHS, st.integers(1, 4000))
def test_no_more_than_a_tenth_of_a_batch_is_padding(lengths: list[int], budget: int) -> None:
    for batch in pack(lengths, budget):
        padded = max(lengths[i] for i in batch) * len(batch)
        assert padded - sum(lengths[i] for i in batch) <= 0.1 * padded


def test_prompts_of_one_length_fill_their_batches() -> None:
    assert [len(batch) for batch in pack([10] * 1000, 2000)] == [200] * 5


@given(LENGTHS, st.data())
def test_suspects_come_first_and_alone(lengths: list[int], data: st.DataObject) -> None:
    suspects = data.draw(st.sets(st.sampled_from(range(len(lengths))))) if lengths else set()
    packer = Packer(lengths, suspects)
    first = [packer.take(lambda _: 10_000) for _ in suspects]
    assert first == [[index] for index in sorted(suspects)]
    rest: list[int] = []
    while packer:
        rest += packer.take(lambda _: 10_000)
    assert sorted([*suspects, *rest]) == list(range(len(lengths)))


@given(st.integers(1, 100), st.sets(st.integers(0, 99), max_size=5))
def test_bisection_finds_each_bad_prompt_and_loses_no_other(count: int, bad: set[int]) -> None:
    packer, found, good = Packer([7] * count), [], []
    while packer:
        batch = packer.take(lambda _: 10_000)
        if not bad & set(batch):
            good += batch
        elif len(batch) == 1:
            found += batch
        else:
            packer.halve(batch)
    assert sorted(found) == sorted(bad & set(range(count)))
    assert sorted([*good, *found]) == list(range(count))


def test_a_batch_that_did_not_fit_comes_back_in_batches_of_half_the_budget_for_good() -> None:
    packer, budget = Packer([10] * 100), TokenBudget(800, torch.device("cpu"))
    batch = packer.take(budget.at)
    assert len(batch) == 80
    budget.halve(len(batch) * 10)
    packer.put_back(batch)
    sizes = []
    while packer:
        sizes.append(len(packer.take(budget.at)))
    assert sizes == [40, 40, 20]


class _Gauge:
    """Tells of a batch that took so much of so much."""

    def __init__(self, taken: int, there: int) -> None:
        self._both = taken, there

    def taken(self) -> list[tuple[int, int]]:
        return [self._both]


def test_the_budget_is_what_the_first_batch_shows_to_fit() -> None:
    budget = TokenBudget("auto", torch.device("cpu"))
    assert budget.at(8) == 32, "a probe"
    budget.learn(_Gauge(64_000, 100_000_000), 8, 8)  # pyright: ignore[reportArgumentType]
    assert budget.at(8) == 256, "what keeps a CPU busy"
    budget.learn(_Gauge(64_000, 200_000), 8, 8)  # pyright: ignore[reportArgumentType]
    assert 32 < budget.at(8) <= 200, "a thousand bytes a token"
    assert budget.at(16) <= budget.at(8) / 2 + 1, "longer prompts may need more for each token"
    assert TokenBudget("auto", torch.device("cuda")).at(8) > 32
