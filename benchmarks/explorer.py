"""Whole pages of `backlens serve` over HTTP, as a browser asks for them: milliseconds, and the server's peak memory.

    python -m benchmarks.explorer FOLDER

FOLDER is a run that `benchmarks.atlas --folder` has left, with its atlas. The server is a process of its own, without
options; the client asks one page after the other on one connection and reads all of it. What a page loads besides (a
style sheet, a script) is kept by browsers and not counted. First every kind of page is asked for once.
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

from benchmarks.asked import Asked, what_to_ask


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    time_pages(parser.parse_args().folder)


def time_pages(folder: str) -> None:
    """Asks for every kind of page of a run, several times over, and prints what it took."""
    kinds = pages(what_to_ask(folder))
    with serving(folder) as server:
        for addresses in kinds.values():
            server.seconds(addresses[-1])
        for name, addresses in kinds.items():
            times = [1000 * server.seconds(address) for address in addresses[:-1]]
            print(f"{name:>36} {statistics.median(times):8,.0f} ms, worst {max(times):,.0f}", flush=True)
        peak = server.peak()
    print(f"peak memory of the server: {peak:,.0f} MiB, {os.cpu_count()} cores")


def pages(asked: Asked) -> dict[str, Sequence[str]]:
    """Addresses by what they are of; the last of each is to warm up with."""

    def tokens(texts: Sequence[str], more: str = "") -> list[str]:
        return [f"/token?text={quote(text)}{more}" for text in texts]

    prompts = asked.prompts
    return {
        "neuron": [f"/neuron/{neuron}" for neuron in asked.neurons],
        "neuron, most kept": [f"/neuron/{neuron}" for neuron in asked.strongest],
        "neuron, with similar ones": [f"/neuron/{neuron}?show=similar" for neuron in asked.neurons],
        "neuron, most kept, with similar ones": [
            f"/neuron/{neuron}?show=similar" for neuron in asked.strongest
        ],
        "rare token": tokens(asked.rare),
        "rare token, places": tokens(asked.rare, "&show=places"),
        "rare token, search": [f"/search?q={token}" for token in asked.rare],
        "common token": tokens(asked.common),
        "common token, places": tokens(asked.common, "&show=places"),
        "common token, search": [f"/search?q={token}" for token in asked.common],
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
        """How long the page takes from the request to its last byte."""
        started = time.perf_counter()
        self.client.request("GET", address)
        answer = self.client.getresponse()
        body = answer.read()
        taken = time.perf_counter() - started
        if answer.status != 200:
            raise SystemExit(f"{address}: {answer.status}: {body.decode()[:300]}")
        return taken

    def peak(self) -> float:
        """Its peak resident memory in MiB. (What `wait4` says of a process is at least what its parent had.)"""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) / 1024


@contextmanager
def serving(folder: str) -> Iterator[Server]:
    """A server of its own."""
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
