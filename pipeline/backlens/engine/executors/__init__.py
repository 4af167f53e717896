"""Choose the executor: shards run in this process, or on Ray actors."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from backlens.engine.executors.base import Executor, RayOptions
from backlens.engine.executors.local import LocalExecutor


def keep_deaths_quiet() -> None:
    """That a worker died is ours to say, not a paragraph of Ray's on standard output."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")


@contextmanager
def executing(ray: RayOptions | None, announce: Callable[[str], None]) -> Iterator[Executor[Any]]:
    """An executor, on Ray or in this process, which is stopped however the block ends."""
    if ray is None:
        executor: Executor[Any] = LocalExecutor()
    else:
        keep_deaths_quiet()
        # The first shard that fails ends the run; Ray would print the traceback of the next one in flight as well.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        from backlens.engine.executors.ray import RayExecutor

        executor = RayExecutor(ray, announce)
    try:
        yield executor
    finally:
        executor.stop()
