"""The two ways to run shards: in this process, or on Ray actors. Both yield commits as shards finish.

An executor pulls shards lazily and keeps only a few in flight, so a million prompts are never held at once.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline.engine.before_ray import keep_deaths_quiet
from pipeline.engine.work import Attempt, Readiness, S, Task
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

    def start(self, job: Task[S]) -> list[Readiness]: ...

    def run(self, shards: Iterator[S]) -> Iterator[ShardCommit]: ...

    def standing(self) -> Standing: ...

    def stop(self) -> None: ...


class LocalExecutor:
    """One worker in this process; shards are written by a second thread while the next is computed."""

    def start(self, job: Task[Any]) -> list[Readiness]:
        self._worker = job.worker()
        return [self._worker.ready()]

    def run(self, shards: Iterator[Any]) -> Iterator[ShardCommit]:
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


@contextmanager
def executing(ray: RayOptions | None, announce: Callable[[str], None]) -> Iterator[Executor[Any]]:
    """An executor, on Ray or in this process, which is stopped however the block ends."""
    if ray is None:
        executor: Executor[Any] = LocalExecutor()
    else:
        keep_deaths_quiet()
        # The first shard that fails ends the run; Ray would print the traceback of the next one in flight as well.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        from pipeline.engine.ray_executor import RayExecutor  # Ray takes seconds to import

        executor = RayExecutor(ray, announce)
    try:
        yield executor
    finally:
        executor.stop()
