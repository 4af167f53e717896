"""The choice of an executor, and the local one: shards run in this process, or on Ray actors."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from backlens.engine.executors.base import (
    AHEAD,
    Attempt,
    Executor,
    RayOptions,
    Readiness,
    ReplicaCounts,
    WorkerSetup,
)
from backlens.store.commit import ShardCommit


def keep_deaths_quiet() -> None:
    """Keep Ray from printing a paragraph per dead worker: the run reports deaths itself."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")


@contextmanager
def executing(ray: RayOptions | None, announce: Callable[[str], None]) -> Iterator[Executor[Any]]:
    """Give an executor on Ray, or in this process for None, and stop it however the block ends."""
    if ray is None:
        executor: Executor[Any] = LocalExecutor()
    else:
        keep_deaths_quiet()
        # The first shard that fails ends the run; Ray would also print the traceback of the next one in flight.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        from backlens.engine.executors.ray import RayExecutor

        executor = RayExecutor(ray, announce)
    try:
        yield executor
    finally:
        executor.stop()


class LocalExecutor:
    """One worker in this process; a second thread writes a shard while the next one is computed."""

    def start(self, setup: WorkerSetup[Any]) -> list[Readiness]:
        self._worker = setup.worker()
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

    def counts(self) -> ReplicaCounts:
        return ReplicaCounts(replicas=1)

    def stop(self) -> None:
        """Do nothing: no process or thread outlives `run`."""
