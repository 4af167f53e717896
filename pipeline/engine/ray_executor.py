"""Shards on Ray actors: one actor per replica of the model; this process only schedules.

Ray schedules and restarts nothing for us: its own task retries burn out before a dead node is declared dead, and
it does not know what is committed. So an actor that dies is replaced here, and its shards are given out again.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from pipeline.engine.events import LOGGER, emit
from pipeline.engine.executors import AHEAD
from pipeline.engine.metrics import RayMetrics
from pipeline.engine.placement import Node, cpus_per_replica
from pipeline.engine.worker import Job, Readiness, Worker
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

    shard: Shard
    slot: int
    attempt: int


class RayExecutor:
    """Keeps `replicas` actors busy with AHEAD shards each."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self.deaths = 0
        """Actors that died and were replaced."""
        self._loading: set[int] = set()
        """Slots of actors that were started again and have given nothing yet."""
        self._metrics: logging.Handler = logging.NullHandler()

    def start(self, job: Job) -> list[Readiness]:
        _connect(self._options.address)
        self._metrics = RayMetrics(str(job.directory))
        LOGGER.addHandler(self._metrics)
        cpus, gpus = _resources(self._options)
        self._remote = ray.remote(Worker).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=AHEAD + 1
        )
        self._job = job
        self._threads = max(1, int(cpus))
        self._actors: list[Any] = [self._new_actor() for _ in range(self._options.replicas)]
        return [self._ready(slot) for slot in range(len(self._actors))]

    def run(self, shards: Iterator[Shard]) -> Iterator[ShardCommit]:
        running: dict[Any, _Given] = {}
        for shard in shards:
            while len(running) >= AHEAD * len(self._actors):
                yield from self._wait(running)
            self._give(shard, 1, running)
        while running:
            yield from self._wait(running)

    def stop(self) -> None:
        LOGGER.removeHandler(self._metrics)
        ray.shutdown()

    def _new_actor(self) -> Any:
        return self._remote.remote(self._job, self._threads)

    def _ready(self, slot: int) -> Readiness:
        """Wait until a worker has loaded its model; one that dies over it is replaced."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with _as_ours():
                    return ray.get(self._actors[slot].ready.remote())
            except RayActorError as error:
                self.deaths += 1
                emit("worker-died", level=logging.WARNING, replica=slot, error=_reason(error))
                if attempt == ATTEMPTS:
                    raise Interrupted(
                        f"a worker died {ATTEMPTS} times while it loaded the model ({_reason(error)}); "
                        "see that a copy fits into memory and run the same command again"
                    ) from error
                self._renew(slot)
        raise AssertionError("unreachable")

    def _renew(self, slot: int) -> None:
        # An actor that is only out of reach may still be at work; two workers on one shard would waste one.
        ray.kill(self._actors[slot])
        self._actors[slot] = self._new_actor()

    def _give(self, shard: Shard, attempt: int, running: dict[Any, _Given]) -> None:
        busy = [given.slot for given in running.values()]
        slot = min(range(len(self._actors)), key=busy.count)
        running[self._actors[slot].run.remote(shard)] = _Given(shard, slot, attempt)

    def _wait(self, running: dict[Any, _Given]) -> Iterator[ShardCommit]:
        """Wait for one shard; replace its actor if that is what ended it."""
        finished, _ = ray.wait(list(running), num_returns=1)
        given = running.pop(finished[0])
        try:
            with _as_ours():
                commit = ray.get(finished[0])
        except RayActorError as error:
            self._replace(given, error, running)
        else:
            if given.slot in self._loading:
                self._loading.remove(given.slot)
                emit("replicas", alive=len(self._actors) - len(self._loading))
            yield commit

    def _replace(self, lost: _Given, error: RayActorError, running: dict[Any, _Given]) -> None:
        """A new actor in the place of a dead one, and its shards given out again."""
        self.deaths += 1
        self._loading.add(lost.slot)
        emit("worker-died", level=logging.WARNING, replica=lost.slot, error=_reason(error))
        emit("replicas", alive=len(self._actors) - len(self._loading))
        orphans = [
            lost,
            *(running.pop(ref) for ref in [r for r, g in running.items() if g.slot == lost.slot]),
        ]
        worst = max(orphans, key=lambda given: given.attempt)
        if worst.attempt >= ATTEMPTS:
            raise Interrupted(
                f"shard {worst.shard.index} was lost with its worker {ATTEMPTS} times "
                f"({_reason(error)}); what is committed stays, the same command goes on from there"
            )
        self._renew(lost.slot)
        for given in orphans:
            emit("retry", level=logging.WARNING, shard=given.shard.index, attempt=given.attempt + 1)
            self._give(given.shard, given.attempt + 1, running)


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
