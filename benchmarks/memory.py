"""Compare a run's peak memory with the size of its model, for several numbers of prompts.

    python -m benchmarks.memory [--prompts 200 2000] [--layers all]

Writes a model of GPT-2's 124M-parameter shape with random weights to a temporary folder, runs `backlens run` on it in a
process of its own, and prints the peak resident memory of that process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shape import make_model, write_prompts


def peak_of(command: list[str]) -> tuple[int, float]:
    """Peak resident bytes and seconds of the command's process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--layers", default="all")
    options = parser.parse_args()
    backlens = str(Path(sys.executable).with_name("backlens"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_model(folder / "model")
        print(f"weights {size / 2**20:,.0f} MiB")
        for count in options.prompts:
            write_prompts(folder / f"{count}.jsonl", count)
            command = [backlens, "run", "--model", str(folder / "model"), "--executor", "local"]
            command += ["--prompts", str(folder / f"{count}.jsonl"), "--out", str(folder / f"out-{count}")]
            peak, seconds = peak_of([*command, "--layers", options.layers])
            over = (peak - size) / 2**20
            print(
                f"{count} prompts: peak {peak / 2**20:,.0f} MiB, {over:,.0f} MiB over the weights, {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
