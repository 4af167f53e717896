"""Run shards in this process, one after the other, and write each beside the next."""

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from backlens.engine.executors.base import AHEAD, Attempt, Readiness, ReplicaCounts, WorkerSetup
from backlens.store.commit import ShardCommit


class LocalExecutor:
    """One worker in this process; shards are written by a second thread while the next is computed."""

    def start(self, job: WorkerSetup[Any]) -> list[Readiness]:
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

    def standing(self) -> ReplicaCounts:
        return ReplicaCounts(replicas=1)

    def stop(self) -> None:
        """Nothing outlives `run`."""
