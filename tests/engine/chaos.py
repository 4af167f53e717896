"""Kills at random over a run on a Ray cluster, and what was computed more than once for them."""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

import psutil

from tests.engine.cluster import Nodes, kill, workers
from tests.engine.command import Finished, count_commits, finish, start, wait_for
from tests.engine.conftest import some_prompts

What = Literal["process", "node", "driver"]
"""Processes to kill; a process is a worker or a rank, depending on the present driver."""

SHARD = 8
"""Prompts of a shard."""
RANKS = ("Leader", "Peer")
"""Classes of the ranks of a replica; one such replica exists at a time."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One that was done."""

    what: Literal["worker", "rank", "node", "driver"]
    replicas: tuple[frozenset[int], ...]
    """The processes of each replica that it ended: all of a gang, whichever rank was hit."""


def numbered_prompts(count: int) -> list[str]:
    """Prompts whose first five bytes tell each from all others, for the log of a misbehaving model."""
    return [f"{number:05d} {record['prompt']}" for number, record in enumerate(some_prompts(count))]


def disturb(
    commands: Sequence[Iterable[object]],
    nodes: Nodes,
    out: Path,
    kills: Iterable[What],
    draw: random.Random,
    announce: Callable[[str], None] = lambda _: None,
) -> tuple[Finished, list[Kill]]:
    """Run commands on one directory through kills to its end: the next of them, in turn, whenever a driver was killed.

    Two kills of three wait until something was committed since the one before: no run gets anywhere when it is killed
    faster than it loads its model. Nodes are killed only with something on them.
    """
    turns = cycle(commands)
    driver = start(*next(turns))
    done: list[Kill] = []
    orphans: list[psutil.Process] = []
    try:
        for number, what in enumerate(kills, 1):
            if number % 3:
                _wait_for_commit(out, driver)
            time.sleep(draw.uniform(0.0, 4.0))
            if driver.poll() is not None:
                raise AssertionError(f"the run ended before kill {number}: {finish(driver)}")
            living = _Living(nodes, orphans)
            if what == "driver":
                orphans = living.replicas()
                done.append(Kill("driver", living.whole(orphans)))
                driver.kill()
                finish(driver)
                driver = start(*next(turns))
            elif what == "node":
                done.append(_kill_node(living, draw))
            else:
                done.append(_kill_process(living, draw))
            announce(f"kill {number}: a {done[-1].what}, {count_commits(out)} shards done")
        return finish(driver), done
    finally:
        driver.kill()


def computed_again(log: Path) -> Counter[int]:
    """How many prompts each process computed that another had to compute again."""
    lines = [line.split() for line in log.read_text().splitlines()]
    last = {prompt: process for process, prompt in lines}
    return Counter(int(process) for process, prompt in lines if last[prompt] != process)


def costs(log: Path, kills: Sequence[Kill]) -> list[list[int]]:
    """Prompts that were computed again for each kill, by replica that it ended.

    Raises AssertionError if any was computed again for nothing: by a process that no kill had ended.
    """
    again = computed_again(log)
    found = [[sum(again.pop(pid, 0) for pid in replica) for replica in each.replicas] for each in kills]
    assert not again, f"computed again, though nothing was killed: {again}"
    return found


@dataclass(frozen=True, slots=True)
class _Living:
    """The replicas of the driver at work."""

    nodes: Nodes
    orphans: Sequence[psutil.Process]
    """Processes of the driver before, which Ray may not have ended yet."""

    def replicas(self, *below: int) -> list[psutil.Process]:
        """The processes below those of some nodes, or of all."""
        found = [each for pid in below or self.nodes.pids for each in workers(pid, "Worker", *RANKS)]
        return [process for process in found if process not in self.orphans]

    def gang(self) -> list[psutil.Process]:
        ranks = [process for pid in self.nodes.pids for process in workers(pid, *RANKS)]
        return [process for process in ranks if process not in self.orphans]

    def whole(self, hit: Sequence[psutil.Process]) -> tuple[frozenset[int], ...]:
        """The replicas that these processes are, or are of."""
        gang = self.gang()
        alone = [frozenset([process.pid]) for process in hit if process not in gang]
        return (*alone, frozenset(rank.pid for rank in gang)) if len(alone) < len(hit) else tuple(alone)


def _kill_process(living: _Living, draw: random.Random) -> Kill:
    victim = draw.choice(wait_for(living.replicas, every=0.05))
    ended, what = living.whole([victim]), "rank" if victim in living.gang() else "worker"
    kill([victim])
    return Kill(what, ended)


def _kill_node(living: _Living, draw: random.Random) -> Kill:
    """Any but the head, which is replaced; one with a replica on it, or a part of one."""
    others = living.nodes.pids[1:]
    number = draw.choice(
        wait_for(lambda: [n for n, pid in enumerate(others) if living.replicas(pid)], every=0.05)
    )
    ended = living.whole(living.replicas(others[number]))
    living.nodes.drop(number)
    living.nodes.add()
    return Kill("node", ended)


def _wait_for_commit(out: Path, driver: "subprocess.Popen[str]") -> None:
    before = count_commits(out)
    wait_for(lambda: count_commits(out) > before or driver.poll() is not None, every=0.05)
