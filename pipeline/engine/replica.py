"""What the Ray executor needs of a replica: one copy of the model, in one process or in several.

A `ReplicaKind` says what a replica asks of the cluster and starts one in the placement group that the executor has
made of that. A replica answers with references, one for each of its processes: all of them must resolve before
it is ready or a shard is done, the first one's value counts, and any that fails is the end of the whole replica.
The executor never mends a replica: it kills it, removes its placement group, and starts another.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.engine.executors import AHEAD
from pipeline.engine.faults import DeviceLost
from pipeline.engine.work import Attempt, Readiness, Task
from pipeline.plain import printable
from pipeline.store.commit import ShardCommit

References = Sequence[Any]
"""Ray's object references, one for each process of a replica."""


class Replica(Protocol):
    """A running copy of the model. Its placement group is the executor's to remove."""

    def ready(self) -> References:
        """Resolve once the model is loaded; the first one to a `Readiness`."""
        ...

    def run(self, attempt: Attempt[Any]) -> References:
        """Resolve once the attempt's shard is committed; the first one to its `ShardCommit`.

        Up to AHEAD attempts are asked for at a time, in one order for all processes.
        """
        ...

    def kill(self) -> None:
        """End every process at once, dead or alive, in whatever they are doing."""
        ...


class ReplicaKind(Protocol):
    """How replicas of one kind are made."""

    @property
    def bundles(self) -> Sequence[Mapping[str, float]]:
        """What each process asks for, in Ray's words: the bundles of the placement group."""
        ...

    def start(self, group: PlacementGroup) -> Replica:
        """Start the processes of a replica in a group that has its place; does not wait for them."""
        ...


@dataclass(frozen=True, slots=True)
class ActorKind:
    """A copy of the model in one actor, on one device or spread over those that the actor has."""

    job: Task[Any]
    cpus: float
    gpus: int

    @property
    def bundles(self) -> Sequence[Mapping[str, float]]:
        return [{"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})]

    def start(self, group: PlacementGroup) -> "ActorReplica":
        worker = ray.remote(WorkerProcess).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_restarts=0,
            max_concurrency=AHEAD + 1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        )
        return ActorReplica(worker.remote(self.job, max(1, int(self.cpus))))


class WorkerProcess:
    """A worker in a process of its own, which ends with its device: what runs there later would fail as well."""

    def __init__(self, job: Task[Any], threads: int) -> None:
        self._worker = job.worker(threads)

    def ready(self) -> Readiness:
        return self._worker.ready()

    def run(self, attempt: Attempt[Any]) -> ShardCommit:
        try:
            return self._worker.run(attempt)
        except DeviceLost as error:
            sys.stderr.write(
                f"backlens: {printable(str(error))}; this worker ends, its shards go to another\n"
            )
            sys.stderr.flush()
            os._exit(1)


@dataclass(frozen=True, slots=True)
class ActorReplica:
    """One actor."""

    actor: Any

    def ready(self) -> References:
        return [self.actor.ready.remote()]

    def run(self, attempt: Attempt[Any]) -> References:
        return [self.actor.run.remote(attempt)]

    def kill(self) -> None:
        # An actor that is only out of reach may still be at work; two workers on one shard would waste one.
        ray.kill(self.actor)
