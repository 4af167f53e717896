"""The two ways to run shards: in this process, or on Ray actors. Both yield commits as shards finish.

An executor pulls shards lazily and keeps only a few in flight, so a million prompts are never held at once.
"""

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from pipeline.engine.worker import Attempt, Job, Readiness, Worker
from pipeline.prompts.shards import Shard
from pipeline.store.commit import ShardCommit

AHEAD = 2
"""Shards in flight per worker: one computing, one being written or waiting."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How an executor is doing."""

    replicas: int = 0
    """Copies of the model that are ready."""
    deaths: int = 0
    """Replicas that died."""
    retries: int = 0
    """Shards that were given out again."""


class Executor(Protocol):
    """Runs shards on workers. `start` loads the models; `run` yields each shard's commit, in any order."""

    def start(self, job: Job) -> list[Readiness]: ...

    def run(self, shards: Iterator[Shard]) -> Iterator[ShardCommit]: ...

    def standing(self) -> Standing: ...

    def stop(self) -> None: ...


class LocalExecutor:
    """One worker in this process; shards are written by a second thread while the next is computed."""

    def start(self, job: Job) -> list[Readiness]:
        self._worker = Worker(job)
        return [self._worker.ready()]

    def run(self, shards: Iterator[Shard]) -> Iterator[ShardCommit]:
        with ThreadPoolExecutor(AHEAD, thread_name_prefix="shard") as pool:
            running: set[Future[ShardCommit]] = set()
            try:
                for shard in shards:
                    running.add(pool.submit(self._worker.run, Attempt(shard)))
                    if len(running) == AHEAD:
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in done)
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            finally:
                for future in running:
                    future.cancel()

    def standing(self) -> Standing:
        return Standing(replicas=1)

    def stop(self) -> None:
        """Nothing outlives `run`."""
