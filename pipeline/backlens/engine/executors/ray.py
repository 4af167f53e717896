"""Shards on Ray actors: this process only schedules.

Ray is not the source of truth: a shard is done when its record is there. What an actor had in hand when it died is
given out again here.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from backlens.engine.blame import forget, next_attempt, noted
from backlens.engine.events import LOGGER, RayMetrics, emit
from backlens.engine.executors.base import AHEAD, Attempt, RayOptions, Readiness, ReplicaCounts, WorkerSetup
from backlens.engine.executors.ray_session import (
    ReplicaLost,
    connect,
    cpus_per_replica,
    cpus_to_fill,
    errors_as_ours,
    node_lost,
    nodes,
    reason,
)
from backlens.engine.executors.replicas import ActorKind, ReplicaKind, ReplicaPool, ReplicaSlot
from backlens.engine.executors.zero3_replica import Zero3Kind
from backlens.engine.worker import RunSetup
from backlens.errors import BacklensError, Interrupted
from backlens.store.commit import ShardCommit

MOST_CONDEMNED = 8
"""Prompts blamed for deaths with no shard done in between: beyond that it is not the prompts."""


@dataclass(frozen=True, eq=False, slots=True)
class _Given:
    """A shard in flight."""

    attempt: Attempt[Any]
    member: ReplicaSlot
    references: tuple[Any, ...]


class RayExecutor:
    """Keeps replicas busy with AHEAD shards each."""

    def __init__(self, options: RayOptions, announce: Callable[[str], None]) -> None:
        self._options = options
        self._announce = announce
        self._running: dict[Any, _Given] = {}
        """By each reference that has not resolved."""
        self._again: deque[Attempt[Any]] = deque()
        """Shards that were lost with their worker."""
        self._retries = 0
        self._condemned = 0
        self._metrics: logging.Handler = logging.NullHandler()

    def start(self, job: WorkerSetup[Any]) -> list[Readiness]:
        joinable = connect(self._options.address)
        self._metrics = RayMetrics(str(job.directory))
        LOGGER.addHandler(self._metrics)
        self._directory = job.directory
        kind = _kind(self._options, job, joinable)
        patience = self._options.placement_timeout
        self._fleet = ReplicaPool(kind, self._options.replicas, patience, self._announce)
        return self._fleet.gather()

    def run(self, shards: Iterator[Any]) -> Iterator[ShardCommit]:
        more = True
        while True:
            self._give_again()
            while more and (member := self._free()) is not None:
                shard = next(shards, None)
                more = shard is not None
                if shard is not None:
                    self._give(Attempt(shard), member)
            if not more and not self._running and not self._again:
                return
            yield from self._wait()

    def stop(self) -> None:
        LOGGER.removeHandler(self._metrics)
        ray.shutdown()

    def standing(self) -> ReplicaCounts:
        return ReplicaCounts(len(self._fleet.ready), self._fleet.deaths, self._retries)

    def _give_again(self) -> None:
        """Lost shards go first, each to a replica that has nothing else."""
        busy = {given.member for given in self._running.values()}
        for member in self._fleet.ready:
            if self._again and member not in busy:
                self._give(self._again.popleft(), member)

    def _free(self) -> ReplicaSlot | None:
        """Who gets the next new shard: nobody while a lost one waits for a replica to be idle."""
        if self._again:
            return None
        load = dict.fromkeys(self._fleet.ready, 0)
        for given in set(self._running.values()):
            load[given.member] += AHEAD if given.attempt.number > 1 else 1
        free = min(load, key=lambda member: load[member], default=None)
        return free if free is not None and load[free] < AHEAD else None

    def _give(self, attempt: Attempt[Any], member: ReplicaSlot) -> None:
        assert member.replica is not None
        given = _Given(attempt, member, tuple(member.replica.run(attempt)))
        self._running.update(dict.fromkeys(given.references, given))

    def _wait(self) -> Iterator[ShardCommit]:
        """Wait for the next thing to happen."""
        references = [*self._running, *self._fleet.references]
        for reference in ray.wait(references, num_returns=1, timeout=1.0)[0]:
            if reference in self._running:
                yield from self._finish(reference)
            else:
                self._fleet.hear(reference)
        self._fleet.tend()

    def _finish(self, reference: Any) -> Iterator[ShardCommit]:
        given = self._running.pop(reference)
        try:
            with errors_as_ours():
                ray.get(reference)
        except ReplicaLost as error:
            self._lose(given, error)
            return
        if not any(other in self._running for other in given.references):
            self._condemned = 0
            if given.attempt.number > 1:
                forget(self._directory, given.attempt.shard.index)
            yield ray.get(given.references[0])

    def _lose(self, lost: _Given, error: BaseException) -> None:
        """Replace a dead replica, and put what it had in hand in line."""
        dropped = {given for given in self._running.values() if given.member is lost.member}
        self._running = {r: given for r, given in self._running.items() if given not in dropped}
        self._fleet.lose(lost.member, error)
        for given in sorted({lost, *dropped}, key=lambda given: given.attempt.shard.index):
            self._retries += 1
            attempt = self._next(given.attempt, error)
            emit("retry", level=logging.WARNING, shard=attempt.shard.index, attempt=attempt.number)
            self._again.append(attempt)

    def _next(self, lost: Attempt[Any], error: BaseException) -> Attempt[Any]:
        shard = lost.shard.index
        in_flight = noted(self._directory, shard) if lost.number > 1 else ()
        attempt = next_attempt(lost, in_flight, node_lost(error))
        if attempt is not None:
            self._condemned += len(attempt.condemned) - len(lost.condemned)
            forget(self._directory, shard)
        if attempt is None or self._condemned > MOST_CONDEMNED:
            raise Interrupted(
                f"shard {shard} was lost with its worker {lost.number + lost.nodes} times "
                f"({reason(error)}); what is committed stays, the same command goes on from there"
            )
        return attempt


def _kind(options: RayOptions, job: WorkerSetup[Any], joinable: bool) -> ReplicaKind:
    """What replicas are like: by how the model is sharded, and as large as lets all of them fit."""
    there = nodes()
    gpus = options.gpus_per_replica
    if gpus is None:
        gpus = int(any(node.gpus for node in there))
    if isinstance(job, RunSetup) and job.zero3:
        kind, processes = partial(Zero3Kind, job), job.zero3.ranks
    else:
        kind, processes = partial(ActorKind, job), 1
    if options.replicas == "auto":
        return kind(cpus_to_fill(there, gpus), gpus)
    try:
        cpus = cpus_per_replica(there, options.replicas * processes, gpus)
    except BacklensError:
        if not joinable:
            raise
        cpus = cpus_to_fill(there, gpus)  # nodes may join: the replicas wait for them
    return kind(cpus, gpus)
