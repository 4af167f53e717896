"""What executors need of whatever they run: a job makes workers, and a worker turns shards into commits.

`backlens run` has one such job (`worker.py`), an edit sweep another (`backlens.editing.sweep`): executors know neither.

The two ways to run shards: in this process, or on Ray actors. Both yield commits as shards finish.

An executor pulls shards lazily and keeps only a few in flight, so a million prompts are never held at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from backlens.prompts.tokenize import Example
from backlens.store.commit import ShardCommit
from backlens.store.directory import Directory


class Numbered(Protocol):
    """A shard, whatever is in it."""

    @property
    def index(self) -> int:
        """By which it is planned and committed, from 0."""
        ...


S = TypeVar("S", bound=Numbered)


@dataclass(frozen=True, slots=True)
class Attempt(Generic[S]):
    """A shard to compute, and what is known from attempts that ended with their worker."""

    shard: S
    number: int = 1
    """From the second on, the worker has no other shard and notes which prompts are in flight."""
    suspects: tuple[int, ...] = ()
    """Prompts to compute first, one at a time."""
    condemned: frozenset[int] = frozenset()
    """Prompts to record as failures and leave out."""
    nodes: int = 0
    """How many nodes were lost under it."""

    def suspected(self, examples: Sequence[Example]) -> set[int]:
        """The places of the suspects."""
        return {place for place, example in enumerate(examples) if example.prompt.prompt_id in self.suspects}


@dataclass(frozen=True, slots=True)
class Readiness:
    """What a worker says once its model is loaded."""

    device: str
    load_seconds: float


class ShardWorker(Protocol[S]):
    """Holds one copy of the model. `run` may be called by several threads at a time."""

    def ready(self) -> Readiness: ...

    def run(self, attempt: Attempt[S], /) -> ShardCommit:
        """Compute and commit one shard; a shard that is already committed is left as it is."""
        ...


class WorkerSetup(Protocol[S]):
    """Everything a worker has to know; small, and sent to every worker."""

    @property
    def directory(self) -> Directory:
        """Where shards are committed."""
        ...

    def worker(self, threads: int | None = None) -> ShardWorker[S]:
        """Load the model, in the process that is to compute."""
        ...


AHEAD = 2
"""Shards in flight per worker: one computing, one being written or waiting."""


@dataclass(frozen=True, slots=True)
class ReplicaCounts:
    """How an executor is doing."""

    replicas: int = 0
    """Copies of the model that are ready."""
    deaths: int = 0
    """Replicas that died."""
    retries: int = 0
    """Shards that were given out again."""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What to ask Ray for."""

    address: str | None = None
    """An existing cluster; None starts one on this machine for the length of the run."""
    replicas: int | Literal["auto"] = 1
    gpus_per_replica: int | None = None
    """None asks for one GPU where the cluster has any, else for none."""
    placement_timeout: float = 300.0
    """Seconds to wait for a place on the cluster while no replica has one."""


class Executor(Protocol[S]):
    """Runs shards on workers. `start` loads the models; `run` yields each shard's commit, in any order."""

    def start(self, job: WorkerSetup[S]) -> list[Readiness]: ...

    def run(self, shards: Iterator[S]) -> Iterator[ShardCommit]: ...

    def standing(self) -> ReplicaCounts: ...

    def stop(self) -> None: ...
