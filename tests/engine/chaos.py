"""Kills at random over a run on a Ray cluster, and what was computed more than once for them."""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import psutil

from tests.engine.cluster import Nodes, kill, workers
from tests.engine.command import Finished, count_commits, finish, start, wait_for
from tests.engine.conftest import some_prompts

What = Literal["worker", "node", "driver"]

SHARD = 8
"""Prompts of a shard."""
CLASSES = ("Worker", "Leader", "Peer")
"""Of the actors that are replicas, or ranks of one."""


def numbered_prompts(count: int) -> list[str]:
    """Prompts whose first five bytes tell each from all others, for the log of a misbehaving model."""
    return [f"{number:05d} {record['prompt']}" for number, record in enumerate(some_prompts(count))]


def disturb(
    arguments: Iterable[object],
    nodes: Nodes,
    out: Path,
    kills: Iterable[What],
    draw: random.Random,
    announce: Callable[[str], None] = lambda _: None,
) -> Finished:
    """Run the command through kills to its end; the last driver's words.

    Two kills of three wait until something was committed since the one before: no run gets anywhere when it is killed
    faster than it loads its model.
    """
    driver = start(*arguments)
    try:
        for number, what in enumerate(kills, 1):
            if number % 3:
                _wait_for_commit(out, driver)
            time.sleep(draw.uniform(0.0, 4.0))
            if driver.poll() is not None:
                raise AssertionError(f"the run ended before kill {number}: {finish(driver)}")
            if what == "driver":
                driver.kill()
                finish(driver)
                driver = start(*arguments)
            elif what == "node":
                nodes.drop(draw.randrange(len(nodes) - 1))
                nodes.add()
            else:
                victim: psutil.Process = draw.choice(wait_for(lambda: _replicas(nodes), every=0.05))
                kill([victim])
            announce(f"kill {number}: a {what}, {count_commits(out)} shards done")
        return finish(driver)
    finally:
        driver.kill()


def computed_again(log: Path) -> Counter[str]:
    """How many prompts each process computed that another had to compute again."""
    lines = [line.split() for line in log.read_text().splitlines()]
    last = {prompt: process for process, prompt in lines}
    return Counter(process for process, prompt in lines if last[prompt] != process)


def _wait_for_commit(out: Path, driver: "subprocess.Popen[str]") -> None:
    before = count_commits(out)
    wait_for(lambda: count_commits(out) > before or driver.poll() is not None, every=0.05)


def _replicas(nodes: Nodes) -> list[psutil.Process]:
    return [process for pid in nodes.pids for process in workers(pid, *CLASSES)]
