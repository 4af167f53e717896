"""A shard whose worker died is tried again; a prompt that kills every worker is found, and no other is blamed."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayActorError, RayError, RayTaskError

from backlens.engine.executors.base import ATTEMPTS, NODES, Attempt, next_attempt
from backlens.engine.executors.ray_session import ReplicaLost, node_lost
from backlens.prompts.prompt import Prompt, Shard

COUNT = 12
BATCH = 4
SHARD = Shard(0, tuple(Prompt(number, "", "", "") for number in range(COUNT)))


def simulated(attempt: Attempt, dies: Callable[[list[int]], bool]) -> tuple[int, ...] | None:
    """The prompts that were in flight when the worker died; None if it did not."""
    left = [number for number in range(COUNT) if number not in attempt.blamed]
    alone = [[number] for number in left if number in attempt.suspects]
    rest = [number for number in left if number not in attempt.suspects]
    for batch in [*alone, *(rest[first : first + BATCH] for first in range(0, len(rest), BATCH))]:
        if dies(batch):
            return tuple(batch)
    return None


@given(st.sets(st.integers(0, COUNT - 1), max_size=4))
def test_exactly_the_prompts_that_kill_are_blamed(poison: set[int]) -> None:
    attempt: Attempt | None = Attempt(SHARD)
    for _ in range(ATTEMPTS * (len(poison) + 1)):
        assert attempt is not None
        in_flight = simulated(attempt, lambda batch: bool(poison & set(batch)))
        if in_flight is None:
            assert attempt.blamed == poison
            return
        attempt = next_attempt(attempt, in_flight if attempt.number > 1 else (), node_lost=False)
    raise AssertionError("no end")


@given(st.lists(st.integers(0, 5), min_size=ATTEMPTS, max_size=ATTEMPTS))
def test_deaths_that_come_at_random_blame_nobody_unless_one_was_alone_twice(batches: list[int]) -> None:
    attempt: Attempt | None = Attempt(SHARD)
    seen: list[tuple[int, ...]] = []
    for batch_number in batches:
        assert attempt is not None
        in_flight = simulated(attempt, _at(batch_number)) or ()
        seen.append(in_flight)
        attempt = next_attempt(attempt, in_flight if attempt.number > 1 else (), node_lost=False)
    blamed = set(seen[-1]) & set(seen[-2]) if len(seen[-1]) == 1 else set()
    assert attempt is None if not blamed else attempt is not None and attempt.blamed == blamed


@given(st.integers(1, NODES), st.integers(1, ATTEMPTS))
def test_nodes_that_are_lost_blame_nobody_and_leave_a_shard_its_attempts(nodes: int, number: int) -> None:
    attempt: Attempt | None = Attempt(SHARD, number, suspects=(5,))
    for _ in range(nodes):
        attempt = next_attempt(attempt, (5,), node_lost=True)
        assert attempt is not None
    assert (attempt.number, attempt.suspects, attempt.blamed) == (number, (5,), frozenset())


def test_a_shard_that_takes_node_after_node_with_it_stops_the_run() -> None:
    assert next_attempt(Attempt(SHARD, nodes=NODES), (), node_lost=True) is None


ACTOR = "34cd"
CRASHED = "Worker unexpectedly exits with a connection error code 2. End of file."
WITH_ITS_NODE = "The actor died because its node has died. Node Id: 12ab"


@pytest.mark.parametrize(
    ("error", "with_node"),
    [
        (RayActorError(ACTOR, CRASHED), False),
        (RayActorError(ACTOR, WITH_ITS_NODE), True),
        (ActorUnavailableError("Socket closed", None), True),
        (NodeDiedError("gone"), True),
    ],
)
def test_a_death_that_nobody_on_the_node_tells_of_is_the_node_s(error: RayError, with_node: bool) -> None:
    """The death of a worker or leader, and that of another rank, which the leader passes on."""
    handed_on = RayTaskError("run", "Traceback", error).as_instanceof_cause()
    for each in (error, handed_on):
        assert isinstance(each, ReplicaLost)
        assert node_lost(each) == with_node


def _at(batch_number: int) -> Callable[[list[int]], bool]:
    count = iter(range(COUNT))
    return lambda _batch: next(count) == batch_number
