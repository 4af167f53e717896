"""`backlens` in processes forked off one that has imported everything, so that each starts in milliseconds.

They are processes like any other, with their own pid, signals and locks: what a kill does to them is what it
does to the console script.
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

from tests.engine.command import environment

PRELOADED = [
    "backlens.cli.main",
    "backlens.cli.run",
    "backlens.cli.run",
    "backlens.engine.run",
    "backlens.engine.executors.ray",
]


def fork(log: Path, *arguments: object) -> ForkServerProcess:
    """Start `backlens …`; what it prints goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, environment()):
        forkserver.ensure_running()
    process = context.Process(target=_main, args=(str(log), [str(argument) for argument in arguments]))
    process.start()
    return process


def _main(log: str, arguments: list[str]) -> None:
    from backlens.cli.entry import main

    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    sys.argv = ["backlens", *arguments]
    main()
