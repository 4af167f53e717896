"""The contract between executors and workers, and the rule that finds a prompt that kills its worker.

An executor knows neither prompts nor edits: a setup makes workers, and a worker turns shards into commits.
`backlens run` has one setup (`engine.worker`), an edit sweep another (`editing.sweep`). An executor pulls shards
lazily and keeps a few in flight, so a million prompts are never in memory at once.

Sometimes a worker dies for a reason that has nothing to do with its shard. So a lost shard is first given out again
as it was, but to a worker that has no other shard: from then on it is clear which shard a death belongs to. That
worker writes down the prompts that it is about to compute, in a small file beside the shard's record, on storage that
outlives the worker and its node. The next attempt computes the prompts that were in flight one at a time. A prompt
that was alone in flight at the last of ATTEMPTS deaths, and in flight at the death before, becomes a failure and is
left out.

A worker that is lost with its node says nothing about prompts, so that attempt is repeated as it was. A worker that
somebody kills looks like one that a prompt killed: four such kills at one shard, the last two during the same prompt,
blame an innocent prompt.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, TypeVar

from backlens.printable import json_text
from backlens.prompts.tokenize import Example
from backlens.store.commit import COMMITS, ShardCommit
from backlens.store.directory import Directory

AHEAD = 2
"""Shards in flight per worker: one is computed, one is written or waits."""
ATTEMPTS = 4
"""Deaths over one shard before a prompt is blamed or the run stops."""
NODES = 8
"""Nodes lost during one shard before the run stops: a prompt might take down whole machines."""
SUFFIX = ".attempt"


class Numbered(Protocol):
    """A shard of any content."""

    @property
    def index(self) -> int:
        """The shard's number in the plan and in its commit, from 0."""
        ...


S = TypeVar("S", bound=Numbered)


@dataclass(frozen=True, slots=True)
class Attempt(Generic[S]):
    """A shard to compute, and the facts from earlier attempts that ended with their worker."""

    shard: S
    number: int = 1
    """From the second attempt on, the worker has no other shard and notes the prompts in flight."""
    suspects: tuple[int, ...] = ()
    """Prompts to compute first, one at a time."""
    blamed: frozenset[int] = frozenset()
    """Prompts to record as failures and leave out."""
    nodes: int = 0
    """Nodes that were lost during this shard."""

    def suspected(self, examples: Sequence[Example]) -> set[int]:
        """Return the indices of the suspects in `examples`."""
        return {index for index, example in enumerate(examples) if example.prompt.prompt_id in self.suspects}


@dataclass(frozen=True, slots=True)
class Readiness:
    """The report of a worker that has loaded its model."""

    device: str
    load_seconds: float


class ShardWorker(Protocol[S]):
    """A process that holds one copy of the model. Several threads may call `run` at a time."""

    def ready(self) -> Readiness: ...

    def run(self, attempt: Attempt[S], /) -> ShardCommit:
        """Compute and commit one shard; leave a shard that has a commit as it is."""
        ...


class WorkerSetup(Protocol[S]):
    """Everything that a worker has to know; small, because every worker receives it."""

    @property
    def directory(self) -> Directory:
        """The directory of the commits."""
        ...

    def worker(self, threads: int | None = None) -> ShardWorker[S]:
        """Load the model in the process that will compute."""
        ...


@dataclass(frozen=True, slots=True)
class ReplicaCounts:
    """The state of an executor."""

    replicas: int = 0
    """Copies of the model that are ready."""
    deaths: int = 0
    """Replicas that died."""
    retries: int = 0
    """Shards that were given out again."""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """The request to Ray."""

    address: str | None = None
    """A running cluster; None starts one on this machine that ends with the run."""
    replicas: int | Literal["auto"] = 1
    gpus_per_replica: int | None = None
    """None asks for one GPU if the cluster has any, else for none."""
    placement_timeout: float = 300.0
    """Seconds to wait while no replica has a place on the cluster."""


class Executor(Protocol[S]):
    """Runs shards on workers: `start` loads the models, `run` yields the commit of each shard in any order."""

    def start(self, setup: WorkerSetup[S]) -> list[Readiness]: ...

    def run(self, shards: Iterator[S]) -> Iterator[ShardCommit]: ...

    def counts(self) -> ReplicaCounts: ...

    def stop(self) -> None: ...


def next_attempt(lost: Attempt[S], in_flight: tuple[int, ...], node_lost: bool) -> Attempt[S] | None:
    """Return the attempt after one that was lost while prompts `in_flight` were computed; None to give up."""
    if node_lost:
        return replace(lost, nodes=lost.nodes + 1) if lost.nodes < NODES else None
    if lost.number < ATTEMPTS:
        return replace(lost, number=lost.number + 1, suspects=in_flight)
    if len(in_flight) == 1 and in_flight[0] in lost.suspects:
        return Attempt(lost.shard, number=2, blamed=lost.blamed | set(in_flight))
    return None


def note(directory: Directory, shard: int, prompt_ids: Sequence[int]) -> None:
    """Write down that these prompts are computed next."""
    directory.write_atomically(_note_name(shard), json_text({"in_flight": list(prompt_ids)}).encode())


def noted(directory: Directory, shard: int) -> tuple[int, ...]:
    """Read the prompts of the shard's last note; none if it has no note."""
    try:
        return tuple(json.loads(directory.read(_note_name(shard)))["in_flight"])
    except FileNotFoundError:
        return ()


def forget(directory: Directory, shard: int) -> None:
    """Remove the note of a shard that is done."""
    directory.remove(_note_name(shard))


def forget_all(directory: Directory) -> None:
    """Remove the notes that killed drivers left."""
    for name in directory.names(COMMITS):
        if name.endswith(SUFFIX):
            directory.remove(f"{COMMITS}/{name}")


def _note_name(shard: int) -> str:
    return f"{COMMITS}/{shard:06d}{SUFFIX}"
