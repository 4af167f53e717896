"""Whole pages of `backlens serve` over HTTP, as a browser asks for them: milliseconds, and the server's peak memory.

    python -m benchmarks.explorer FOLDER

FOLDER is a run of `benchmarks.atlas --folder`, with its atlas. The server is a process of its own, without options; the
client reads one page after the other on one connection. Style sheet and script are not counted, because browsers cache
them. One page of every kind warms up the server.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

from benchmarks.questions import Subjects, choose_subjects


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    time_pages(parser.parse_args().folder)


def time_pages(folder: str) -> None:
    """Time several pages of every kind and print the results."""
    kinds = pages(choose_subjects(folder))
    with serving(folder) as server:
        for addresses in kinds.values():
            server.seconds(addresses[-1])
        for name, addresses in kinds.items():
            times = [1000 * server.seconds(address) for address in addresses[:-1]]
            print(f"{name:>36} {statistics.median(times):8,.0f} ms, worst {max(times):,.0f}", flush=True)
        peak = server.peak()
    print(f"peak memory of the server: {peak:,.0f} MiB, {os.cpu_count()} cores")


def pages(subjects: Subjects) -> dict[str, Sequence[str]]:
    """Addresses by kind of page; the last of each kind warms up the server."""

    def tokens(texts: Sequence[str], more: str = "") -> list[str]:
        return [f"/token?text={quote(text)}{more}" for text in texts]

    prompts = subjects.prompts
    return {
        "neuron": [f"/neuron/{neuron}" for neuron in subjects.neurons],
        "neuron, most kept": [f"/neuron/{neuron}" for neuron in subjects.strongest],
        "neuron, with similar ones": [f"/neuron/{neuron}?show=similar" for neuron in subjects.neurons],
        "neuron, most kept, with similar ones": [
            f"/neuron/{neuron}?show=similar" for neuron in subjects.strongest
        ],
        "rare token": tokens(subjects.rare),
        "rare token, places": tokens(subjects.rare, "&show=places"),
        "rare token, search": [f"/search?q={token}" for token in subjects.rare],
        "common token": tokens(subjects.common),
        "common token, places": tokens(subjects.common, "&show=places"),
        "common token, search": [f"/search?q={token}" for token in subjects.common],
        "prompt": [f"/prompt/{prompt}" for prompt in prompts],
        "prompt, other module": [f"/prompt/{prompt}?module=mlp.up" for prompt in prompts],
        "prompt, as JSON": [f"/prompt/{prompt}.json" for prompt in prompts],
        "two prompts": [
            f"/compare?one={one}&two={two}"
            for one, two in zip(prompts, [*prompts[1:], prompts[0]], strict=True)
        ],
        "layers": ["/layers"] * 4,
        "run": ["/"] * 4,
    }


@dataclass(frozen=True)
class Server:
    """A running `backlens serve` and a connection to it."""

    process: subprocess.Popen[str]
    client: HTTPConnection

    def seconds(self, address: str) -> float:
        """Seconds from the request of a page to its last byte."""
        started = time.perf_counter()
        self.client.request("GET", address)
        answer = self.client.getresponse()
        body = answer.read()
        taken = time.perf_counter() - started
        if answer.status != 200:
            raise SystemExit(f"{address}: {answer.status}: {body.decode()[:300]}")
        return taken

    def peak(self) -> float:
        """Peak resident memory in MiB. (`wait4` reports at least the memory of the parent.)"""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) / 1024


@contextmanager
def serving(folder: str) -> Iterator[Server]:
    """A server in a process of its own."""
    entry = [sys.executable, "-c", "from backlens.cli.entry import main; main()"]
    process = subprocess.Popen([*entry, "serve", folder, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://(\S+?):(\d+)", process.stdout.readline())
        if found is None:
            raise SystemExit(f"{folder} is not served")
        yield Server(process, HTTPConnection(found[1], int(found[2])))
    finally:
        process.kill()


if __name__ == "__main__":
    main()
