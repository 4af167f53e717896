"""Measure seconds per prompt as prompts, positions, k, neurons and workers grow.

    python -m benchmarks.scaling [--only prompts positions k neurons workers] [--threads 2]

GPT-2's 124M-parameter shape with random weights; `backlens run` is a process of its own. Times are those of the run's
report by stage, without start-up and loading. Workers are Ray actors of one thread each, on a node with one CPU per
worker, and are timed from the first to the last commit. The axis of prompts uses two layers, to save time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shape import make_model, write_prompts
from tests.engine.cluster import one_node_cluster

SHARD = 32
AXES = ("prompts", "positions", "k", "neurons", "workers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        for axis in options.only:
            for label, count, arguments, threads in points(axis, options.threads):
                value = seconds_a_prompt(folder, count, arguments, threads)
                print(f"{axis:>10} {label:>14} {value:8.4f} s per prompt", flush=True)


def points(axis: str, threads: int) -> list[tuple[str, int, list[str], int]]:
    """The runs of an axis: label, number of prompts, options, and threads per process."""
    local = ["--executor", "local"]
    if axis == "prompts":
        two_layers = [*local, "--layers", "10-11"]
        return [(str(count), count, two_layers, threads) for count in (256, 1024, 4096)]
    if axis == "workers":
        # with many shards, it matters little which worker has the last one
        ray = ["--executor", "ray", "--shard-prompts", str(SHARD), "--replicas"]
        return [(count, 14 * SHARD, [*ray, count], 1) for count in ("1", "2")]
    values = {"positions": ("last", "all"), "k": ("1", "10", "100"), "neurons": ("0", "16", "256", "-1")}[
        axis
    ]
    option = {"positions": "--positions", "k": "--top-k", "neurons": "--neurons"}[axis]
    return [(value, 8 if value == "-1" else 48, [*local, option, value], threads) for value in values]


def seconds_a_prompt(folder: Path, count: int, arguments: list[str], threads: int) -> float:
    prompts, out = folder / f"{count}.jsonl", folder / f"out-{time.monotonic_ns()}"
    write_prompts(prompts, count)
    entry = [sys.executable, "-c", "from backlens.cli.entry import main; main()", "run"]
    files = ["--model", str(folder / "model"), "--prompts", str(prompts), "--out", str(out)]
    command, environment = [*entry, *files, *arguments], os.environ | {"OMP_NUM_THREADS": str(threads)}
    if "ray" in arguments:
        replicas = int(arguments[-1])
        with one_node_cluster(cpus=replicas) as (address, _):
            subprocess.run([*command, "--address", address], env=environment, check=True, capture_output=True)
        times = sorted(file.stat().st_mtime for file in (out / "_commits").glob("*.json"))
        # at about the first commit, every worker has its first shard done
        return (times[-1] - times[replicas - 1]) / (count - replicas * SHARD)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    commits = [json.loads(file.read_text()) for file in (out / "_commits").glob("*.json")]
    stages = ("seconds_tokenize", "seconds_model", "seconds_factors", "seconds_lens", "seconds_rows")
    return sum(commit["stats"][stage] for commit in commits for stage in stages) / count


if __name__ == "__main__":
    main()
