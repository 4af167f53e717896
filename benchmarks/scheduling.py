"""Measure the driver: its memory over many prompts, and its processor time as a share of the workers' time.

    python -m benchmarks.scheduling [--prompts 10000] [--nodes 3]

A Ray cluster of several nodes on this machine, a tiny model and short prompts: the least work per shard.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tests.engine.cluster import several_nodes
from tests.engine.command import environment, write_jsonl
from tests.engine.conftest import some_prompts
from tests.tiny import save_tiny

STAGES = ("tokenize", "model", "factors", "lens", "rows", "tables", "write")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, out = save_tiny(folder / "model"), folder / "out"
        prompts = write_jsonl(folder / "prompts.jsonl", some_prompts(options.prompts, longest=12))
        command = [sys.executable, "-c", "from backlens.cli.entry import main; main()", "run"]
        command += ["--model", str(model), "--prompts", str(prompts), "--out", str(out), "--neurons", "4"]
        with several_nodes(options.nodes) as nodes:
            command += ["--executor", "ray", "--address", nodes.address, "--replicas", str(options.nodes)]
            driver = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
            memory, spent = watched(psutil.Process(driver.pid), out)
        if driver.wait():
            raise SystemExit("the run failed")
        report(out, memory, spent)


def watched(driver: psutil.Process, out: Path) -> tuple[list[int], float]:
    """Resident bytes of the driver, twice per second since the first commit, and its CPU seconds since then."""
    memory: list[int] = []
    first = spent = 0.0
    while driver.status() != psutil.STATUS_ZOMBIE:
        if next((out / "_commits").glob("*.json"), None) is not None:
            times = driver.cpu_times()
            first = first or times.user + times.system
            spent = times.user + times.system - first
            if driver.memory_info().rss:
                memory.append(driver.memory_info().rss)
        time.sleep(0.5)
    return memory, spent


def report(out: Path, memory: list[int], spent: float) -> None:
    records = [json.loads(file.read_text()) for file in (out / "_commits").glob("*.json")]
    worked = sum(record["stats"].get(f"seconds_{stage}", 0.0) for record in records for stage in STAGES)
    quarter = max(1, len(memory) // 4)
    early, late = max(memory[:quarter]) / 2**20, max(memory[-quarter:]) / 2**20
    print(
        f"{sum(record['prompts'] for record in records):,} prompts in {len(records):,} shards, {os.cpu_count()} cores"
    )
    print(f"driver's memory: {early:.0f} MiB in the first quarter, {late:.0f} MiB in the last")
    print(f"driver's CPU time: {spent:.1f} s, workers' time {worked:.1f} s: {spent / worked:.1%}")


if __name__ == "__main__":
    main()
