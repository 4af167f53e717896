"""Kills at random over one job: workers, a whole node, and the driver.

    python -m benchmarks.chaos [--kills 30] [--prompts 600] [--seed 0] [--ranks 2]

A Ray cluster of a head and two nodes on this machine runs a tiny model that naps over each prompt and writes down every
prompt it computes. Most kills hit a worker; one in ten the driver, which is started again, and one in ten a whole node
but the head, which is replaced. With ranks a replica is a gang of so many processes (`--sharding zero3`), and a kill
hits one of them. Prints what was killed, whether the tables equal those of an undisturbed run, and how many prompts
were computed more than once.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from tests.engine.chaos import SHARD, What, computed_again, disturb, numbered_prompts
from tests.engine.cluster import several_nodes
from tests.engine.command import assert_complete, assert_same_run, backlens
from tests.engine.misbehaving import command, save_misbehaving

NODES = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--naps", type=float, default=0.4, help="seconds a prompt takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, help="processes of a replica")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report(options, Path(name))


def report(options: argparse.Namespace, folder: Path) -> None:
    prompts, log = numbered_prompts(options.prompts), folder / "log"
    clean, out = folder / "clean", folder / "out"
    shards = ("--shard-prompts", SHARD)
    done = backlens(
        *command(save_misbehaving(folder / "quick"), prompts, clean), *shards, "--executor", "local"
    )
    if done.status:
        raise SystemExit(done.stderr)
    model = save_misbehaving(folder / "model", log=log, naps=options.naps)
    kills: list[What] = [kind(number) for number in range(options.kills)]
    began = time.monotonic()
    with several_nodes(NODES) as nodes:
        engine = ("--executor", "ray", "--address", nodes.address, *replicas(options.ranks))
        arguments = (*command(model, prompts, out), *engine, *shards)
        done = disturb(arguments, nodes, out, kills, random.Random(options.seed), partial(print, flush=True))
    if done.status:
        raise SystemExit(done.stderr)
    assert_complete(out, options.prompts)
    assert_same_run(clean, out)
    print(f"{time.monotonic() - began:.0f} s; the tables equal those of an undisturbed run")
    again = computed_again(log)
    print(f"killed: {', '.join(f'{count} {what}s' for what, count in Counter(kills).items())}")
    print(f"computed again: {again.total()} prompts, {again.total() / SHARD / len(kills):.2f} shards a kill")
    print(f"of one process: at most {max(again.values(), default=0) / SHARD:.2f} shards")


def kind(number: int) -> What:
    return "node" if number % 10 == 4 else "driver" if number % 10 == 9 else "worker"


def replicas(ranks: int) -> tuple[object, ...]:
    if ranks == 1:
        return ("--replicas", "auto")
    return ("--sharding", "zero3", "--ranks", ranks, "--gpus-per-replica", 0)


if __name__ == "__main__":
    main()
