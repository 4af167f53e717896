"""Shards on Ray actors: one actor per replica of the model; this process only schedules.

Ray schedules and restarts nothing for us: its own task retries burn out before a dead node is declared dead, and
it does not know what is committed. So an actor that dies is replaced here, and its shards are given out again.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from pipeline.engine.executors import AHEAD
from pipeline.engine.gang import GangKind
from pipeline.engine.placement import Node, cpus_per_replica
from pipeline.engine.replica import ActorKind, Replica, ReplicaKind
from pipeline.engine.worker import Attempt, Job, Readiness
from pipeline.errors import BacklensError, Interrupted
from pipeline.prompts.shards import Shard
from pipeline.store.commit import ShardCommit

ATTEMPTS = 4
"""How often a shard is tried on a worker that dies under it before the run stops."""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What to ask Ray for."""

    address: str | None = None
    """An existing cluster; None starts one on this machine for the length of the run."""
    replicas: int = 1
    gpus_per_replica: int | None = None
    """None asks for one GPU where the cluster has any, else for none."""


@dataclass(slots=True)
class _Given:
    """A shard in flight."""

    attempt: Attempt
    slot: int
    references: tuple[Any, ...]


class RayExecutor:
    """Keeps `replicas` actors busy with AHEAD shards each."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self.deaths = 0
        """Actors that died and were replaced."""

    def start(self, job: Job) -> list[Readiness]:
        _connect(self._options.address)
        self._kind = _kind(self._options, job)
        self._replicas = [_place(self._kind) for _ in range(self._options.replicas)]
        return [self._ready(slot) for slot in range(len(self._replicas))]

    def run(self, shards: Iterator[Shard]) -> Iterator[ShardCommit]:
        running: dict[Any, _Given] = {}
        for shard in shards:
            while len({id(given) for given in running.values()}) >= AHEAD * len(self._replicas):
                yield from self._wait(running)
            self._give(Attempt(shard), running)
        while running:
            yield from self._wait(running)

    def stop(self) -> None:
        ray.shutdown()

    def _ready(self, slot: int) -> Readiness:
        """Wait until a replica has loaded its model; one that dies over it is replaced."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with _as_ours():
                    return ray.get(list(self._replicas[slot].replica.ready()))[0]
            except RayActorError as error:
                self.deaths += 1
                if attempt == ATTEMPTS:
                    raise Interrupted(
                        f"a worker died {ATTEMPTS} times while it loaded the model ({_reason(error)}); "
                        "see that a copy fits into memory and run the same command again"
                    ) from error
                self._renew(slot)
        raise AssertionError("unreachable")

    def _renew(self, slot: int) -> None:
        self._replicas[slot].remove()
        self._replicas[slot] = _place(self._kind)

    def _give(self, attempt: Attempt, running: dict[Any, _Given]) -> None:
        busy = [given.slot for given in running.values()]
        slot = min(range(len(self._replicas)), key=busy.count)
        given = _Given(attempt, slot, tuple(self._replicas[slot].replica.run(attempt)))
        running.update(dict.fromkeys(given.references, given))

    def _wait(self, running: dict[Any, _Given]) -> Iterator[ShardCommit]:
        """Wait for one process's share of a shard; replace its replica if that is what ended it."""
        finished, _ = ray.wait(list(running), num_returns=1)
        given = running.pop(finished[0])
        try:
            with _as_ours():
                ray.get(finished[0])
        except RayActorError as error:
            self._replace(given, error, running)
        else:
            if not any(reference in running for reference in given.references):
                yield ray.get(given.references[0])

    def _replace(self, lost: _Given, error: RayActorError, running: dict[Any, _Given]) -> None:
        """A new replica in the place of a dead one, and its shards given out again."""
        self.deaths += 1
        dropped = [running.pop(ref) for ref in [r for r, g in running.items() if g.slot == lost.slot]]
        orphans = {given.attempt.shard.index: given.attempt for given in (lost, *dropped)}
        worst = max(orphans.values(), key=lambda attempt: attempt.number)
        if worst.number >= ATTEMPTS:
            raise Interrupted(
                f"shard {worst.shard.index} was lost with its worker {ATTEMPTS} times "
                f"({_reason(error)}); what is committed stays, the same command goes on from there"
            )
        self._renew(lost.slot)
        for attempt in orphans.values():
            self._give(replace(attempt, number=attempt.number + 1), running)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A replica and the place that was made for it."""

    group: PlacementGroup
    replica: Replica

    def remove(self) -> None:
        self.replica.kill()
        remove_placement_group(self.group)


def _place(kind: ReplicaKind) -> _Placed:
    group = placement_group([dict(bundle) for bundle in kind.bundles], strategy="PACK")
    return _Placed(group, kind.start(group))


def _kind(options: RayOptions, job: Job) -> ReplicaKind:
    """What replicas are like, by how the model is sharded."""
    if job.zero3 is not None:
        ranks = job.zero3.ranks
        gpus = None if options.gpus_per_replica is None else min(1, options.gpus_per_replica)
        return GangKind(
            job, *_resources(replace(options, replicas=options.replicas * ranks, gpus_per_replica=gpus))
        )
    return ActorKind(job, *_resources(options))


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        with _sigterm_kept():
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(address="local", include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = address or "a local cluster"
        raise BacklensError(f"address: cannot reach Ray at {where}: {_reason(error)}") from error


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; whoever started the run has said already what it is to do."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # what Ray's own handler does
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _resources(options: RayOptions) -> tuple[float, int]:
    """CPUs and GPUs to ask for per replica."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [Node(node.get("CPU", 0), node.get("GPU", 0)) for node in alive]
    gpus = options.gpus_per_replica
    if gpus is None:
        gpus = int(any(node.gpus for node in nodes))
    return cpus_per_replica(nodes, options.replicas, gpus), gpus


@contextmanager
def _as_ours() -> Iterator[None]:
    """Give back the error that a worker raised, as if it had been raised here."""
    try:
        yield
    except ActorDiedError as error:
        _raise_ours(error)
        if error.actor_init_failed:
            raise Interrupted(f"a worker could not start: {_reason(error)}") from error
        raise
    except RayTaskError as error:
        _raise_ours(error)
        raise


def _raise_ours(error: BaseException) -> None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BacklensError):
            raise type(cause)(str(getattr(cause, "cause", cause))) from error
        cause = getattr(cause, "cause", None) or cause.__cause__


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
