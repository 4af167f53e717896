"""What executors need of whatever they run: a job makes workers, and a worker turns shards into commits.

`backlens run` has one such job (`worker.py`), an edit sweep another (`pipeline.editing.sweep`): executors know neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipeline.prompts.tokenize import Example
from pipeline.store.commit import ShardCommit
from pipeline.store.files import Directory


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


class Task(Protocol[S]):
    """Everything a worker has to know; small, and sent to every worker."""

    @property
    def directory(self) -> Directory:
        """Where shards are committed."""
        ...

    def worker(self, threads: int | None = None) -> ShardWorker[S]:
        """Load the model, in the process that is to compute."""
        ...
