"""Replicas of a run on Ray: one copy of the model each, in one process or several, from request to end.

A `ReplicaKind` says what a replica needs of the cluster, and starts one in the placement group made for it. A replica
answers with references, one per process. It is ready, or a shard is done, when all of them have resolved; the value
of the first one counts, and any that fails ends the whole replica.

Replicas come and go with the nodes of the cluster. A `ReplicaSlot` is in one of these states:

    waiting     its placement group has no place yet
    loading     its processes were started
    ready       it can take shards
    lost        it was killed and its place given back; a new slot waits instead

Nothing is left to Ray's restarts: they are used up before Ray declares a dead node dead. The executor never repairs a
replica: it kills it, removes its placement group, and starts another.
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
"""Ray's object references, one per process of a replica."""


class Replica(Protocol):
    """A running copy of the model; the executor removes its placement group."""

    def ready(self) -> References:
        """References that resolve when the model is loaded, the first one to a `Readiness`."""
        ...

    def run(self, attempt: Attempt[Any]) -> References:
        """References that resolve when the shard is committed, the first one to its `ShardCommit`.

        A replica has up to AHEAD attempts at a time, in the same order in all its processes.
        """
        ...

    def kill(self) -> None:
        """End every process at once, whatever it is doing."""
        ...


class ReplicaKind(Protocol):
    """Makes replicas of one kind."""

    @property
    def bundles(self) -> Sequence[Mapping[str, float]]:
        """Resources per process: the bundles of the placement group."""
        ...

    def start(self, group: PlacementGroup) -> Replica:
        """Start the processes of a replica in a group that has a place, without waiting for them."""
        ...


@dataclass(frozen=True, slots=True)
class ActorKind:
    """A copy of the model in one actor, on one or all of the actor's devices."""

    setup: WorkerSetup[Any]
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
        return ActorReplica(worker.remote(self.setup, max(1, int(self.cpus))))


class WorkerProcess:
    """A worker in its own process, which ends when its device fails: later shards would fail there as well."""

    def __init__(self, setup: WorkerSetup[Any], threads: int) -> None:
        self._worker = setup.worker(threads)

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
    """A copy of the model in one actor."""

    actor: Any

    def ready(self) -> References:
        return [self.actor.ready.remote()]

    def run(self, attempt: Attempt[Any]) -> References:
        return [self.actor.run.remote(attempt)]

    def kill(self) -> None:
        # An actor that is out of reach may still work; two workers on one shard would waste one.
        ray.kill(self.actor)


STARTS = 4
"""Deaths in a row before a replica is ready, after which it is given up."""
SECONDS_BETWEEN_LOOKS = 3.0
"""Time between looks at the nodes of the cluster."""
SECONDS_UNSAID = 10.0
"""Time without a place before the run says so."""


@dataclass(eq=False, slots=True)
class ReplicaSlot:
    """A replica, or the request for one."""

    group: PlacementGroup
    starts: int
    """Number of this start in a row without a ready replica, from 1."""
    awaited: list[Any]
    """References that must resolve before the next state: that of the place, then those of the processes."""
    answer: Any = None
    """The reference that resolves to the readiness."""
    replica: Replica | None = None
    readiness: Readiness | None = None


@dataclass(eq=False)
class ReplicaPool:
    """Keeps the requested number of replicas, or as many as fit on the cluster."""

    kind: ReplicaKind
    size: int | Literal["auto"]
    timeout: float
    """Seconds without a place for any replica before the run stops."""
    announce: Callable[[str], None]
    deaths: int = 0
    """Replicas that died."""
    _slots: list[ReplicaSlot] = field(default_factory=list)
    _given_up: int = 0
    _looked_at: float = float("-inf")
    _placed_at: float = field(default_factory=time.monotonic)
    """Time when a replica last had a place."""
    _said: bool = False

    @property
    def ready(self) -> list[ReplicaSlot]:
        return [slot for slot in self._slots if slot.readiness is not None]

    @property
    def references(self) -> list[Any]:
        """References that must resolve before every slot is ready."""
        return [reference for slot in self._slots for reference in slot.awaited]

    def gather(self) -> list[Readiness]:
        """Wait until every replica that has a place is ready, and at least one is."""
        self.tend()
        while not self.ready or any(slot.replica and slot.awaited for slot in self._slots):
            for reference in ray.wait(self.references, num_returns=1, timeout=1.0)[0]:
                self.hear(reference)
            self.tend()
        return [slot.readiness for slot in self._slots if slot.readiness is not None]

    def hear(self, reference: Any) -> None:
        """Handle one of `references` that has resolved."""
        slot = next(slot for slot in self._slots if reference in slot.awaited)
        try:
            with errors_as_ours():
                ray.get(reference)
        except ReplicaLost as error:
            self.lose(slot, error)
            return
        slot.awaited.remove(reference)
        if slot.replica is None:
            slot.replica = self.kind.start(slot.group)
            slot.awaited = list(slot.replica.ready())
            slot.answer = slot.awaited[0]
        elif not slot.awaited:
            slot.readiness = ray.get(slot.answer)
            emit("replicas", alive=len(self.ready))

    def lose(self, slot: ReplicaSlot, error: BaseException) -> None:
        """Kill what is left of a dead replica, and request another."""
        self.deaths += 1
        self._remove(slot)
        emit("worker-died", level=logging.WARNING, error=reason(error))
        emit("replicas", alive=len(self.ready))
        if slot.readiness is not None:
            self._request(starts=1)
        elif slot.starts < STARTS:
            self._request(slot.starts + 1)
        elif self.ready:
            self._given_up += 1
            self.announce(f"a replica that died {STARTS} times while it loaded the model is given up")
        else:
            raise Interrupted(
                f"a worker died {STARTS} times while it loaded the model ({reason(error)}); "
                "see that a copy fits into memory and run the same command again"
            )

    def tend(self) -> None:
        """Look at the cluster every few seconds: use new nodes, and see whether any replica has a place.

        Raises Interrupted if none has had a place for too long.
        """
        now = time.monotonic()
        if now - self._looked_at < SECONDS_BETWEEN_LOOKS:
            return
        self._looked_at = now
        wanted = self._wanted()
        for _ in range(wanted - len(self._slots)):
            self._request(starts=1)
        for slot in [slot for slot in self._slots if slot.replica is None]:
            if len(self._slots) > wanted:
                self._remove(slot)
        if any(_has_place(slot) for slot in self._slots):
            self._placed_at, self._said = now, False
        self._complain(now - self._placed_at)

    def _wanted(self) -> int:
        size = capacity(nodes(), self.kind.bundles) if self.size == "auto" else self.size
        return max(1, size - self._given_up)

    def _request(self, starts: int) -> None:
        group = placement_group([dict(bundle) for bundle in self.kind.bundles], strategy="PACK")
        self._slots.append(ReplicaSlot(group, starts, [group.ready()]))

    def _remove(self, slot: ReplicaSlot) -> None:
        self._slots.remove(slot)
        if slot.replica is not None:
            slot.replica.kill()
        remove_placement_group(slot.group)

    def _complain(self, seconds: float) -> None:
        if seconds < min(SECONDS_UNSAID, self.timeout):
            return
        missing = shortage(self.kind.bundles, ray.available_resources(), ray.cluster_resources())
        if seconds >= self.timeout:
            raise Interrupted(
                f"no place for a replica within {self.timeout:g} s: {missing}; add nodes, stop other jobs or ask for "
                "less (--gpus-per-replica, --replicas), and run the same command again"
            )
        if not self._said:
            self._said = True
            self.announce(f"waiting up to {self.timeout:g} s for a place: {missing}")


def _has_place(slot: ReplicaSlot) -> bool:
    """Tell whether the replica works or can start; a group whose node has left waits for a place again."""
    if slot.readiness is not None:
        return True
    return placement_group_table(slot.group).get("state") == "CREATED"
