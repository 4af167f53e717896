"""The connection to Ray, and Ray's errors as ours."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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

from pipeline.engine.placement import Node
from pipeline.engine.ray_address import named_cluster
from pipeline.engine.ray_folder import REMEDY, ray_folder
from pipeline.errors import BacklensError, Interrupted

QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}

ReplicaLost = (RayActorError, ActorUnschedulableError, NodeDiedError, OutOfMemoryError)
"""What a replica's references raise when it died, its node did, or Ray killed it before the node was out of memory."""


def connect(address: str | None) -> bool:
    """Connect to a cluster, or start one on this machine; True if it is one that others can join."""
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
    """The machines that are alive."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(node.get("CPU", 0), node.get("GPU", 0)) for node in alive]


@contextmanager
def errors_as_ours() -> Iterator[None]:
    """Give back the error that a worker raised, as if it had been raised here."""
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
    """Whether a lost replica went with its node, or was cut off with it, and not by what it computed.

    How a process ended is told by Ray's daemon on the same node. Where that is silent an actor is out of reach, and
    after some failed health checks the node is said to have died.
    """
    if isinstance(error, (ActorUnavailableError, NodeDiedError)):
        return True
    return isinstance(error, RayActorError) and "its node has died" in error.error_msg


def reason(error: BaseException) -> str:
    """The last line of what Ray says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _raise_ours(error: BaseException) -> None:
    cause: BaseException | None = error
    while cause is not None:
        # Ray's error is of our class as well as its own, and its text is a traceback
        if isinstance(cause, BacklensError) and not isinstance(cause, RayTaskError):
            raise type(cause)(str(cause)) from error
        cause = getattr(cause, "cause", None) or cause.__cause__


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
