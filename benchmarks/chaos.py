"""Kill workers, ZeRO-3 ranks, nodes and drivers of one run at random, and count the prompts that are computed again.

    python -m benchmarks.chaos [--kills 30] [--prompts 480] [--seed 0]

A Ray cluster of a head and two nodes on this machine runs a tiny model that sleeps at each prompt and records every
prompt that it computes. Of each six kills, in random order, four hit a process, one hits a node other than the head
(the node is replaced), and one hits the driver. Each new driver uses the other sharding on the same run directory: one
worker with a whole copy per node, or two ZeRO-3 ranks. Prints whether the tables equal those of an undisturbed run,
and how many prompts were computed again per kind of kill.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.engine.chaos import SHARD, Kill, What, costs, disturb, numbered_prompts
from tests.engine.cluster import several_nodes
from tests.engine.command import assert_complete, assert_same_run, backlens
from tests.engine.misbehaving import command, save_misbehaving

NODES = 3
KINDS: tuple[What, ...] = ("process", "process", "process", "process", "node", "driver")
WORKERS = ("--replicas", "auto")
RANKS = ("--sharding", "zero3", "--ranks", 2, "--gpus-per-replica", 0)
BATCH = ("--batch-tokens", 64)
"""Two or three prompts per batch. The prompts in flight at a kill count as computed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=480)
    parser.add_argument("--naps", type=float, default=0.4, help="seconds per prompt")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report(options, Path(name))


def report(options: argparse.Namespace, folder: Path) -> None:
    prompts, log = numbered_prompts(options.prompts), folder / "log"
    clean, out = folder / "clean", folder / "out"
    plan = ("--shard-prompts", SHARD, *BATCH)
    done = backlens(
        *command(save_misbehaving(folder / "quick"), prompts, clean), *plan, "--executor", "local"
    )
    if done.status:
        raise SystemExit(done.stderr)
    model = save_misbehaving(folder / "model", log=log, naps=options.naps)
    draw = random.Random(options.seed)
    kinds: list[What] = [
        kind for _ in range(0, options.kills, len(KINDS)) for kind in draw.sample(KINDS, len(KINDS))
    ]
    began = time.monotonic()
    with several_nodes(NODES) as nodes:
        common = (*command(model, prompts, out), *plan, "--executor", "ray", "--address", nodes.address)
        commands = [(*common, *WORKERS), (*common, *RANKS)]
        done, kills = disturb(commands, nodes, out, kinds[: options.kills], draw, partial(print, flush=True))
    if done.status:
        raise SystemExit(done.stderr)
    assert_complete(out, options.prompts)
    assert_same_run(clean, out)
    print(f"{time.monotonic() - began:.0f} s; the tables equal those of an undisturbed run")
    tell(kills, costs(log, kills))


def tell(kills: Sequence[Kill], lost: Sequence[Sequence[int]]) -> None:
    """Prompts that were computed again, in shards, per kind of kill."""
    print("killed       computed again   shards per kill   by one replica, at most")
    for what in ("worker", "rank", "node", "driver"):
        line(f"{what}s", [cost for each, cost in zip(kills, lost, strict=True) if each.what == what])
    line("in all", lost)


def line(name: str, lost: Sequence[Sequence[int]]) -> None:
    prompts = sum(map(sum, lost))
    a_kill, most = (
        prompts / SHARD / max(len(lost), 1),
        max((max(each, default=0) for each in lost), default=0),
    )
    print(f"{len(lost):2} {name:8} {prompts:8} prompts   {a_kill:13.2f}   {most / SHARD:23.2f}")


if __name__ == "__main__":
    main()
