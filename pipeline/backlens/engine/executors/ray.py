"""The Ray executor: shards on actors, and this process only schedules.

A shard is done when its commit exists, whatever Ray says. The executor gives the shards of a dead actor out again.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from backlens.engine.events import LOGGER, emit
from backlens.engine.executors.base import (
    AHEAD,
    Attempt,
    RayOptions,
    Readiness,
    ReplicaCounts,
    WorkerSetup,
    forget,
    next_attempt,
    noted,
)
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

MOST_BLAMED = 8
"""Prompts blamed for deaths with no shard done in between; more deaths have another cause than prompts."""


@dataclass(frozen=True, eq=False, slots=True)
class _Given:
    """A shard that a replica has."""

    attempt: Attempt[Any]
    slot: ReplicaSlot
    references: tuple[Any, ...]


class RayExecutor:
    """Keeps every replica busy with AHEAD shards."""

    def __init__(self, options: RayOptions, announce: Callable[[str], None]) -> None:
        self._options = options
        self._announce = announce
        self._running: dict[Any, _Given] = {}
        """The shards that replicas have, by each reference that has not resolved."""
        self._lost: deque[Attempt[Any]] = deque()
        """Shards that were lost with their worker and wait for another."""
        self._retries = 0
        self._blamed = 0
        self._metrics: logging.Handler = logging.NullHandler()

    def start(self, setup: WorkerSetup[Any]) -> list[Readiness]:
        """Connect to Ray, and wait until every replica that has a place is ready, and at least one is."""
        joinable = connect(self._options.address)
        self._metrics = RayMetrics(str(setup.directory))
        LOGGER.addHandler(self._metrics)
        self._directory = setup.directory
        kind = _kind(self._options, setup, joinable)
        timeout = self._options.placement_timeout
        self._pool = ReplicaPool(kind, self._options.replicas, timeout, self._announce)
        return self._pool.gather()

    def run(self, shards: Iterator[Any]) -> Iterator[ShardCommit]:
        more = True
        while True:
            self._give_lost()
            while more and (slot := self._free()) is not None:
                shard = next(shards, None)
                more = shard is not None
                if shard is not None:
                    self._give(Attempt(shard), slot)
            if not more and not self._running and not self._lost:
                return
            yield from self._wait()

    def stop(self) -> None:
        LOGGER.removeHandler(self._metrics)
        ray.shutdown()

    def counts(self) -> ReplicaCounts:
        return ReplicaCounts(len(self._pool.ready), self._pool.deaths, self._retries)

    def _give_lost(self) -> None:
        """Give each lost shard to a replica that has no other; lost shards go before new ones."""
        busy = {given.slot for given in self._running.values()}
        for slot in self._pool.ready:
            if self._lost and slot not in busy:
                self._give(self._lost.popleft(), slot)

    def _free(self) -> ReplicaSlot | None:
        """Return the replica for the next new shard; none while a lost shard waits for a replica to be idle."""
        if self._lost:
            return None
        load = dict.fromkeys(self._pool.ready, 0)
        for given in set(self._running.values()):
            load[given.slot] += AHEAD if given.attempt.number > 1 else 1
        free = min(load, key=lambda slot: load[slot], default=None)
        return free if free is not None and load[free] < AHEAD else None

    def _give(self, attempt: Attempt[Any], slot: ReplicaSlot) -> None:
        assert slot.replica is not None
        given = _Given(attempt, slot, tuple(slot.replica.run(attempt)))
        self._running.update(dict.fromkeys(given.references, given))

    def _wait(self) -> Iterator[ShardCommit]:
        """Wait for the next event, at most a second, and handle it."""
        references = [*self._running, *self._pool.references]
        for reference in ray.wait(references, num_returns=1, timeout=1.0)[0]:
            if reference in self._running:
                yield from self._finish(reference)
            else:
                self._pool.hear(reference)
        self._pool.tend()

    def _finish(self, reference: Any) -> Iterator[ShardCommit]:
        given = self._running.pop(reference)
        try:
            with errors_as_ours():
                ray.get(reference)
        except ReplicaLost as error:
            self._lose(given, error)
            return
        if not any(other in self._running for other in given.references):
            self._blamed = 0
            if given.attempt.number > 1:
                forget(self._directory, given.attempt.shard.index)
            yield ray.get(given.references[0])

    def _lose(self, lost: _Given, error: BaseException) -> None:
        """Replace a dead replica, and queue the shards that it had."""
        dropped = {given for given in self._running.values() if given.slot is lost.slot}
        self._running = {r: given for r, given in self._running.items() if given not in dropped}
        self._pool.lose(lost.slot, error)
        for given in sorted({lost, *dropped}, key=lambda given: given.attempt.shard.index):
            self._retries += 1
            attempt = self._next(given.attempt, error)
            emit("retry", level=logging.WARNING, shard=attempt.shard.index, attempt=attempt.number)
            self._lost.append(attempt)

    def _next(self, lost: Attempt[Any], error: BaseException) -> Attempt[Any]:
        shard = lost.shard.index
        in_flight = noted(self._directory, shard) if lost.number > 1 else ()
        attempt = next_attempt(lost, in_flight, node_lost(error))
        if attempt is not None:
            self._blamed += len(attempt.blamed) - len(lost.blamed)
            forget(self._directory, shard)
        if attempt is None or self._blamed > MOST_BLAMED:
            raise Interrupted(
                f"shard {shard} was lost with its worker {lost.number + lost.nodes} times "
                f"({reason(error)}); what is committed stays, the same command goes on from there"
            )
        return attempt


def _kind(options: RayOptions, setup: WorkerSetup[Any], joinable: bool) -> ReplicaKind:
    """Choose the kind of replica by the sharding, and its CPUs so that all replicas fit on the nodes."""
    there = nodes()
    gpus = options.gpus_per_replica
    if gpus is None:
        gpus = int(any(node.gpus for node in there))
    if isinstance(setup, RunSetup) and setup.zero3:
        kind, processes = partial(Zero3Kind, setup, setup.zero3.ranks), setup.zero3.ranks
    else:
        kind, processes = partial(ActorKind, setup), 1
    if options.replicas == "auto":
        return kind(cpus_to_fill(there, gpus), gpus)
    try:
        cpus = cpus_per_replica(there, options.replicas * processes, gpus)
    except BacklensError:
        if not joinable:
            raise
        cpus = cpus_to_fill(there, gpus)  # nodes may join: the replicas wait for them
    return kind(cpus, gpus)


BUCKETS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Upper bounds of the histogram's buckets, in seconds."""


class RayMetrics(logging.Handler):
    """Counts the events of one run as Ray metrics, which every node of a cluster exports for Prometheus.

    The driver counts, because commits bring the workers' measurements: each shard is counted once, and a worker that
    dies takes no counts with it. The node of the driver exports the metrics.

        ray_backlens_prompts_total, _tokens_total, _failures_total, _retries_total, _worker_deaths_total     counters
        ray_backlens_replicas_alive, _shards_left                                                            gauges
        ray_backlens_shard_seconds, by stage                                                                 histogram

    All have the label `run`, the run directory.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        tags = {"run": run}
        count = {
            "prompts": "Prompts of committed shards, failed ones included",
            "tokens": "Tokens of committed shards",
            "failures": "Prompts that could not be processed",
            "retries": "Shards given out again after their worker died",
            "worker_deaths": "Workers that died and were replaced",
        }
        self._counters = {
            name: Counter(f"backlens_{name}", text, tuple(tags)).set_default_tags(tags)
            for name, text in count.items()
        }
        self._replicas = Gauge("backlens_replicas_alive", "Copies of the model at work", tuple(tags))
        self._left = Gauge("backlens_shards_left", "Shards without a commit", tuple(tags))
        self._seconds = Histogram(
            "backlens_shard_seconds", "Worker seconds of a shard", BUCKETS, ("run", "stage")
        )
        for metric in (self._replicas, self._left, self._seconds):
            metric.set_default_tags(tags)

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = getattr(record, "fields", {})
        match record.getMessage():
            case "started":
                self._left.set(fields["shards_left"])
                self._replicas.set(fields["replicas"])
            case "replicas":
                self._replicas.set(fields["alive"])
            case "shard":
                self._count(prompts=fields["prompts"], tokens=fields["tokens"], failures=fields["failed"])
                self._left.set(fields["shards_left"])
                for stage, seconds in fields["seconds"].items():
                    self._seconds.observe(seconds, {"stage": stage})
            case "worker-died":
                self._count(worker_deaths=1)
            case "retry":
                self._count(retries=1)

    def _count(self, **increments: int) -> None:
        for name, value in increments.items():
            if value:
                self._counters[name].inc(value)
