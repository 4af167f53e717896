"""Kills at random over one job: workers, a whole node, and the driver.

    python -m benchmarks.chaos [--kills 30] [--prompts 600] [--seed 0]

A Ray cluster of three nodes on this machine runs a tiny model that naps over each prompt and writes down every
prompt it computes. Most kills hit a worker; one in ten the driver, which is started again, and one in ten a whole node
but the head, which is replaced. Prints what was killed, whether the tables equal those of an undisturbed run, and how
many prompts were computed more than once, a kill.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.engine.cluster import Nodes, kill, several_nodes, workers
from tests.engine.command import (
    assert_complete,
    assert_same_run,
    backlens,
    count_commits,
    environment,
    wait_for,
)
from tests.engine.conftest import some_prompts
from tests.engine.misbehaving import command, save_misbehaving

SHARD = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--naps", type=float, default=0.4, help="seconds a prompt takes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), random.Random(options.seed)
        prompts = [str(record["prompt"]) for record in some_prompts(options.prompts)]
        quick = save_misbehaving(folder / "quick")
        clean = folder / "clean"
        done = backlens(*command(quick, prompts, clean), "--executor", "local", "--shard-prompts", SHARD)
        if done.status:
            raise SystemExit(done.stderr)
        log = folder / "log"
        model = save_misbehaving(folder / "model", log=log, naps=options.naps)
        out = folder / "out"
        with several_nodes(3) as nodes:
            arguments = [*command(model, prompts, out), "--executor", "ray", "--address", nodes.address]
            arguments += ["--replicas", "auto", "--shard-prompts", SHARD]
            killed = disturb(arguments, nodes, out, options.kills, draw)
        assert_complete(out, options.prompts)
        same(clean, out)
        loads = Counter(line.split()[0] for line in log.read_text().splitlines())
        computed = sum(int(line.split()[1]) for line in log.read_text().splitlines())
        probes = 2 * len(loads)  # each process looks at its model with two passes of one row
        again = computed - probes - options.prompts
        print(f"killed: {', '.join(f'{count} {what}' for what, count in killed.items())}")
        print(f"computed more than once: {again} prompts, {again / SHARD / options.kills:.2f} shards a kill")


def disturb(
    arguments: list[object], nodes: Nodes, out: Path, kills: int, draw: random.Random
) -> Counter[str]:
    """Run the command to its end through so many kills."""
    killed: Counter[str] = Counter()
    driver = start(arguments)
    while driver.poll() is None or killed.total() < kills:
        if driver.poll() is not None:
            raise SystemExit(f"the run ended after {killed.total()} kills; give it more --prompts")
        if killed.total() == kills:
            driver.wait()
            break
        time.sleep(draw.uniform(0.5, 6.0))
        what = "node" if killed.total() % 10 == 4 else "driver" if killed.total() % 10 == 9 else "worker"
        if what == "driver":
            driver.kill()
            driver.wait()
            driver = start(arguments)
        elif what == "node":
            nodes.drop(draw.randrange(len(nodes) - 1))
            nodes.add()
        else:
            victim: psutil.Process = draw.choice(wait_for(lambda: workers(os.getpid()), every=0.05))
            kill([victim])
        killed[what] += 1
        print(f"{killed.total()} kills ({what}), {count_commits(out)} shards done", flush=True)
    if driver.returncode:
        raise SystemExit(f"the run ended with status {driver.returncode}")
    return killed


def start(arguments: list[object]) -> "subprocess.Popen[bytes]":
    entry = [sys.executable, "-c", "from pipeline.cli.main import main; main()"]
    return subprocess.Popen([*entry, *map(str, arguments)], env=environment(), stdin=subprocess.DEVNULL)


def same(clean: Path, out: Path) -> None:
    assert_same_run(clean, out)
    print("the tables equal those of an undisturbed run; every prompt is accounted for")


if __name__ == "__main__":
    main()
