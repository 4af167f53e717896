"""The connection to Ray: the folder of its files, the connection itself, Ray's errors as ours, and room on nodes.

A Ray that this process starts keeps logs and sockets in `ray` below RAY_TMPDIR, TMPDIR or /tmp. TMPDIR is often not
usable: a scheduler's folder for a job is too long for the path of a socket, and in /tmp the folder may belong to
another user.
"""

import os
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from backlens.engine.executors.ray_address import named_cluster
from backlens.errors import BacklensError, Interrupted

SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10"
LONGEST = 103 if sys.platform == "darwin" else 107
"""Bytes in the path of a Unix socket."""
ROOM = 50 * 2**20
"""Bytes for the logs and maps of a session, with a margin."""
REMEDY = "set RAY_TMPDIR to a folder of your own with a short path, or do without Ray: --executor local"


def ray_folder() -> str:
    """Return the first usable folder; raises Interrupted if none is, or if RAY_TMPDIR, a user's choice, is not."""
    chosen = os.environ.get("RAY_TMPDIR")
    if chosen:
        if misfit := _misfit(Path(chosen, "ray")):
            raise Interrupted(f"RAY_TMPDIR: Ray cannot keep its files in {chosen}, which {misfit}; {REMEDY}")
        return str(Path(chosen, "ray"))
    bases = [Path(base) for base in dict.fromkeys((os.environ.get("TMPDIR") or "/tmp", "/tmp"))]
    misfits: dict[Path, str] = {}
    for base in (*bases, *(_of_this_user(base) for base in bases)):
        misfit = _misfit(base / "ray")
        if misfit is None and base not in bases:
            misfit = _made_private(base)
        if misfit is None:
            return str(base / "ray")
        misfits[base] = misfit
    found = ", ".join(f"{base} {misfit}" for base, misfit in misfits.items())
    raise Interrupted(f"Ray finds no folder for its files ({found}); {REMEDY}")


def _of_this_user(base: Path) -> Path:
    return base / f"ray-{os.geteuid()}"


def _misfit(folder: Path) -> str | None:
    """Return the reason why Ray cannot keep its files there; None if it can."""
    length = len(os.fsencode(folder / SOCKET))
    if length > LONGEST:
        return f"is {length - LONGEST} bytes too long for the path of a socket"
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not there.is_dir():
        return f"cannot be used, for {there} is no folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return "may not be written"
    return "has no room" if shutil.disk_usage(there).free < ROOM else None


def _made_private(folder: Path) -> str | None:
    """Make a folder for this user alone, because everybody may write to Ray's; return the reason if it is not."""
    try:
        folder.mkdir(0o700, exist_ok=True)
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return None if is_ours else "is open to others"


@dataclass(frozen=True, slots=True)
class Node:
    """The resources of one machine."""

    cpus: float
    gpus: float

    def room(self, cpus: float, gpus: int) -> int:
        """Return how many replicas of that size fit on the machine."""
        by_cpus = int(self.cpus / cpus + 1e-9)
        return min(by_cpus, int(self.gpus // gpus)) if gpus else by_cpus


def cpus_per_replica(nodes: Sequence[Node], replicas: int, gpus: int) -> float:
    """Return the most CPUs that each replica can have: whole numbers, or hundredths below one.

    A replica is on one node, so the room per node counts, not the sum: a request that fits on no node would wait for
    ever. Raises BacklensError if the replicas do not fit at any size.
    """
    sizes = {_rounded_down(node.cpus / count) for node in nodes for count in range(1, replicas + 1)}
    for size in sorted(sizes - {0.0}, reverse=True):
        if sum(node.room(size, gpus) for node in nodes) >= replicas:
            return size
    found = ", ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes[:8])
    raise BacklensError(
        f"replicas: {replicas} with {gpus} GPUs each do not fit on the cluster's nodes ({found}"
        f"{', …' if len(nodes) > 8 else ''}); ask for fewer --replicas or --gpus-per-replica"
    )


def cpus_to_fill(nodes: Sequence[Node], gpus: int) -> float:
    """Return the CPUs per replica, for as many replicas as GPUs allow, or for one per node without GPUs.

    All replicas have one size. Nodes that can give less than half as much as the largest do not count, because a head
    node often has few CPUs, or none.
    """
    shares = [node.cpus / (node.gpus // gpus if gpus else 1) for node in nodes if node.gpus >= gpus]
    largest = max(shares, default=0.0)
    return _rounded_down(min((share for share in shares if share >= largest / 2), default=0.0)) or 1.0


def capacity(nodes: Sequence[Node], bundles: Sequence[Mapping[str, float]]) -> int:
    """Return how many replicas of equal processes fit on the nodes."""
    cpus, gpus = bundles[0]["CPU"], int(bundles[0].get("GPU", 0))
    return sum(node.room(cpus, gpus) for node in nodes) // len(bundles)


def shortage(
    bundles: Sequence[Mapping[str, float]], free: Mapping[str, float], there: Mapping[str, float]
) -> str:
    """Say what a replica needs, and how much of that the cluster has."""
    processes = f"{len(bundles)} processes with each " if len(bundles) > 1 else ""
    needs = " and ".join(f"{amount:g} {name}s" for name, amount in sorted(bundles[0].items(), reverse=True))
    has = " and ".join(
        f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}s"
        for name in sorted(bundles[0], reverse=True)
    )
    return f"a replica needs {processes}{needs} on one node; the cluster has {has} free"


def _rounded_down(cpus: float) -> float:
    return float(int(cpus)) if cpus >= 1 else int(cpus * 100) / 100


QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}

ReplicaLost = (RayActorError, ActorUnschedulableError, NodeDiedError, OutOfMemoryError)
"""Errors of a reference whose replica or node died, or which Ray killed before the node ran out of memory."""


def connect(address: str | None) -> bool:
    """Connect to a cluster, or start one on this machine; return whether other nodes can join it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    cluster = named_cluster(address)
    try:
        with _sigterm_kept():
            if cluster is not None:
                ray.init(address=cluster, **QUIET)
            else:
                ray.init(address="local", include_dashboard=False, _temp_dir=ray_folder(), **QUIET)
    except BacklensError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {reason(error)}"
        if cluster is not None:
            raise BacklensError(
                f"address: {cluster}: a Ray cluster, but it cannot be joined ({said})"
            ) from error
        raise Interrupted(f"Ray cannot start on this machine ({said}); {REMEDY}") from error
    return cluster is not None


def nodes() -> list[Node]:
    """Return the live machines of the cluster."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(node.get("CPU", 0), node.get("GPU", 0)) for node in alive]


@contextmanager
def errors_as_ours() -> Iterator[None]:
    """Raise the error that a worker raised as if it had been raised here."""
    try:
        yield
    except ActorDiedError as error:
        _raise_ours(error)
        if error.actor_init_failed:
            said, ours = reason(error), f"{BacklensError.__module__}.{BacklensError.__qualname__}: "
            if said.startswith(ours):  # Ray keeps the text of what `__init__` raised, not the error
                raise BacklensError(said.removeprefix(ours)) from error
            raise Interrupted(f"a worker could not start: {reason(error)}") from error
        raise
    except RayTaskError as error:
        _raise_ours(error)
        raise


def node_lost(error: BaseException) -> bool:
    """Tell whether a replica was lost because its node died or was cut off, and not by what it computed.

    Ray's daemon on the same node reports how a process ended. While the daemon is silent the actor is unavailable, and
    after some failed health checks Ray says that the node has died.
    """
    if isinstance(error, (ActorUnavailableError, NodeDiedError)):
        return True
    return isinstance(error, RayActorError) and "its node has died" in error.error_msg


def reason(error: BaseException) -> str:
    """Return the last line of Ray's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _raise_ours(error: BaseException) -> None:
    cause: BaseException | None = error
    while cause is not None:
        # Ray's error has our class beside its own, and its text is a traceback
        if isinstance(cause, BacklensError) and not isinstance(cause, RayTaskError):
            raise type(cause)(str(cause)) from error
        cause = getattr(cause, "cause", None) or cause.__cause__


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by its own."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # what Ray's own handler does
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
