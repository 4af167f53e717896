"""A shard whose worker died is tried again; a prompt that kills every worker is found, and no other is blamed."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.retry import ATTEMPTS, next_attempt
from pipeline.engine.work import Attempt
from pipeline.prompts.record import Prompt
from pipeline.prompts.shards import Shard

COUNT = 12
BATCH = 4
SHARD = Shard(0, tuple(Prompt(number, "", "", "") for number in range(COUNT)))


def simulated(attempt: Attempt, dies: Callable[[list[int]], bool]) -> tuple[int, ...] | None:
    """The prompts that were in flight when the worker died; None if it did not."""
    left = [number for number in range(COUNT) if number not in attempt.condemned]
    alone = [[number] for number in left if number in attempt.suspects]
    rest = [number for number in left if number not in attempt.suspects]
    for batch in [*alone, *(rest[first : first + BATCH] for first in range(0, len(rest), BATCH))]:
        if dies(batch):
            return tuple(batch)
    return None


@given(st.sets(st.integers(0, COUNT - 1), max_size=4))
def test_exactly_the_prompts_that_kill_are_condemned(poison: set[int]) -> None:
    attempt: Attempt | None = Attempt(SHARD)
    for _ in range(ATTEMPTS * (len(poison) + 1)):
        assert attempt is not None
        in_flight = simulated(attempt, lambda batch: bool(poison & set(batch)))
        if in_flight is None:
            assert attempt.condemned == poison
            return
        attempt = next_attempt(attempt, in_flight if attempt.number > 1 else ())
    raise AssertionError("no end")


@given(st.lists(st.integers(0, 5), min_size=ATTEMPTS, max_size=ATTEMPTS))
def test_deaths_that_come_at_random_condemn_nobody_unless_one_was_alone_twice(batches: list[int]) -> None:
    attempt: Attempt | None = Attempt(SHARD)
    seen: list[tuple[int, ...]] = []
    for batch_number in batches:
        assert attempt is not None
        in_flight = simulated(attempt, _at(batch_number)) or ()
        seen.append(in_flight)
        attempt = next_attempt(attempt, in_flight if attempt.number > 1 else ())
    blamed = set(seen[-1]) & set(seen[-2]) if len(seen[-1]) == 1 else set()
    assert attempt is None if not blamed else attempt is not None and attempt.condemned == blamed


def _at(batch_number: int) -> Callable[[list[int]], bool]:
    count = iter(range(COUNT))
    return lambda _batch: next(count) == batch_number
