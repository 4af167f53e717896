"""What the Ray executor needs of a replica: one copy of the model, in one process or in several.

A `ReplicaKind` says what a replica asks of the cluster and starts one in the placement group that the executor has
made of that. A replica answers with references, one for each of its processes: all of them must resolve before
it is ready or a shard is done, the first one's value counts, and any that fails is the end of the whole replica.
The executor never mends a replica: it kills it, removes its placement group, and starts another.

The replicas of a run on Ray, from a request for a place to their end; they come and go with the cluster's nodes.

A member of the fleet is in one of these states:

    waiting     its placement group has no place yet
    loading     its processes were started
    ready       it can be given shards
    lost        killed, its place given back, and another member waiting in its stead

Ray restarts nothing for us: its own retries burn out before a dead node is declared dead.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from backlens.capture.packing import DeviceLost
from backlens.engine.events import emit
from backlens.engine.executors.base import AHEAD, Attempt, Readiness, WorkerSetup
from backlens.engine.executors.ray_session import (
    ReplicaLost,
    capacity,
    errors_as_ours,
    nodes,
    reason,
    shortage,
)
from backlens.errors import Interrupted
from backlens.printable import printable
from backlens.store.commit import ShardCommit

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

    job: WorkerSetup[Any]
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

    def __init__(self, job: WorkerSetup[Any], threads: int) -> None:
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


STARTS = 4
"""How often in a row a replica may die before it is ready."""
SECONDS_BETWEEN_LOOKS = 3.0
"""Between looks at the cluster's nodes."""
SECONDS_UNSAID = 10.0
"""How long a place is waited for before that is said."""


@dataclass(eq=False, slots=True)
class ReplicaSlot:
    """A replica, or the request for one."""

    group: PlacementGroup
    starts: int
    """Which attempt in a row this is at getting one ready."""
    awaited: list[Any]
    """References that have to resolve before its next state: its place's, then its processes'."""
    answer: Any = None
    """The one of them that resolves to the readiness."""
    replica: Replica | None = None
    readiness: Readiness | None = None


@dataclass(eq=False)
class ReplicaPool:
    """Keeps as many replicas as were asked for, or as the cluster holds."""

    kind: ReplicaKind
    size: int | Literal["auto"]
    patience: float
    """Seconds without a place for any replica before the run stops."""
    announce: Callable[[str], None]
    deaths: int = 0
    """Replicas that died."""
    _members: list[ReplicaSlot] = field(default_factory=list)
    _given_up: int = 0
    _looked_at: float = float("-inf")
    _placed_at: float = field(default_factory=time.monotonic)
    """When a replica was seen to have a place."""
    _said: bool = False

    @property
    def ready(self) -> list[ReplicaSlot]:
        return [member for member in self._members if member.readiness is not None]

    @property
    def references(self) -> list[Any]:
        """What is waited for until every member is ready."""
        return [reference for member in self._members for reference in member.awaited]

    def gather(self) -> list[Readiness]:
        """Wait until every replica that has a place is ready, and one is."""
        self.tend()
        while not self.ready or any(member.replica and member.awaited for member in self._members):
            for reference in ray.wait(self.references, num_returns=1, timeout=1.0)[0]:
                self.hear(reference)
            self.tend()
        return [member.readiness for member in self._members if member.readiness is not None]

    def hear(self, reference: Any) -> None:
        """Act on one of `references` that has resolved."""
        member = next(member for member in self._members if reference in member.awaited)
        try:
            with errors_as_ours():
                ray.get(reference)
        except ReplicaLost as error:
            self.lose(member, error)
            return
        member.awaited.remove(reference)
        if member.replica is None:
            member.replica = self.kind.start(member.group)
            member.awaited = list(member.replica.ready())
            member.answer = member.awaited[0]
        elif not member.awaited:
            member.readiness = ray.get(member.answer)
            emit("replicas", alive=len(self.ready))

    def lose(self, member: ReplicaSlot, error: BaseException) -> None:
        """Kill what is left of a replica that died, and ask for another."""
        self.deaths += 1
        self._remove(member)
        emit("worker-died", level=logging.WARNING, error=reason(error))
        emit("replicas", alive=len(self.ready))
        if member.readiness is not None:
            self._request(starts=1)
        elif member.starts < STARTS:
            self._request(member.starts + 1)
        elif self.ready:
            self._given_up += 1
            self.announce(f"a replica that died {STARTS} times while it loaded the model is given up")
        else:
            raise Interrupted(
                f"a worker died {STARTS} times while it loaded the model ({reason(error)}); "
                "see that a copy fits into memory and run the same command again"
            )

    def tend(self) -> None:
        """Look at the cluster now and then: are there more nodes to fill, and does any replica have a place?

        Raises Interrupted when none has had one for too long.
        """
        now = time.monotonic()
        if now - self._looked_at < SECONDS_BETWEEN_LOOKS:
            return
        self._looked_at = now
        wanted = self._wanted()
        for _ in range(wanted - len(self._members)):
            self._request(starts=1)
        for member in [member for member in self._members if member.replica is None]:
            if len(self._members) > wanted:
                self._remove(member)
        if any(_has_place(member) for member in self._members):
            self._placed_at, self._said = now, False
        self._complain(now - self._placed_at)

    def _wanted(self) -> int:
        size = capacity(nodes(), self.kind.bundles) if self.size == "auto" else self.size
        return max(1, size - self._given_up)

    def _request(self, starts: int) -> None:
        group = placement_group([dict(bundle) for bundle in self.kind.bundles], strategy="PACK")
        self._members.append(ReplicaSlot(group, starts, [group.ready()]))

    def _remove(self, member: ReplicaSlot) -> None:
        self._members.remove(member)
        if member.replica is not None:
            member.replica.kill()
        remove_placement_group(member.group)

    def _complain(self, seconds: float) -> None:
        if seconds < min(SECONDS_UNSAID, self.patience):
            return
        missing = shortage(self.kind.bundles, ray.available_resources(), ray.cluster_resources())
        if seconds >= self.patience:
            raise Interrupted(
                f"no place for a replica within {self.patience:g} s: {missing}; add nodes, stop other jobs or ask for "
                "less (--gpus-per-replica, --replicas), and run the same command again"
            )
        if not self._said:
            self._said = True
            self.announce(f"waiting up to {self.patience:g} s for a place: {missing}")


def _has_place(member: ReplicaSlot) -> bool:
    """Whether it is at work or can begin; a group whose node has left waits for a place again."""
    if member.readiness is not None:
        return True
    return placement_group_table(member.group).get("state") == "CREATED"
