"""A Ray cluster of one node for a test session, and the processes that Ray starts."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.engine.command import environment, wait_for

PORTS = (
    "port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
SMALLEST_STORE = 80_000_000


@contextmanager
def one_node_cluster(
    cpus: int = 3, job_server: int | None = None, token: str | None = None
) -> Iterator[tuple[str, int]]:
    """A cluster's address and the id of its head process. It is gone afterwards, whatever happened.

    With a port for it the head runs Ray's dashboard, which is the job server; with a token it asks for that.
    """
    # Sockets lie in this folder and their paths must be short. Ports are all our own: another cluster may run here.
    folder = tempfile.mkdtemp(prefix="r")
    ports = free_ports(len(PORTS))
    log = Path(folder, "head.log")
    secret = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    binaries = Path(sys.executable).parent
    dashboard = "--include-dashboard=false" if job_server is None else f"--dashboard-port={job_server}"
    with log.open("w") as stream:
        head = subprocess.Popen(
            [
                str(binaries / "ray"),
                *("start", "--head", "--block", "--disable-usage-stats"),
                *(dashboard, f"--object-store-memory={SMALLEST_STORE}", f"--temp-dir={folder}"),
                *(f"--num-cpus={cpus}", "--num-gpus=0", "--min-worker-port=0", "--max-worker-port=0"),
                *(f"--{name}={port}" for name, port in zip(PORTS, ports, strict=True)),
            ],
            env=environment() | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"} | secret,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None, every=0.2)
        assert head.poll() is None, log.read_text()
        yield f"127.0.0.1:{ports[0]}", head.pid
    finally:
        started = descendants(head.pid)
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        kill([psutil.Process(head.pid)] if head.poll() is None else [])
        kill(started)
        shutil.rmtree(folder, ignore_errors=True)


class Nodes:
    """A cluster of several nodes on this machine, each a tree of processes of its own."""

    def __init__(self, address: str, head: int, folder: str) -> None:
        self.address = address
        self.head = head
        self._folder = folder
        self._others: list[subprocess.Popen[bytes]] = []

    def add(self, cpus: int = 1) -> None:
        """One more node; does not wait for it."""
        names = [name for name in PORTS if name not in ("port", "ray-client-server-port")]
        with Path(self._folder, f"node-{len(self._others)}.log").open("a") as stream:
            self._others.append(
                subprocess.Popen(
                    [
                        str(Path(sys.executable).parent / "ray"),
                        *("start", f"--address={self.address}", "--block", "--disable-usage-stats"),
                        *(f"--object-store-memory={SMALLEST_STORE}", f"--num-cpus={cpus}", "--num-gpus=0"),
                        *("--min-worker-port=0", "--max-worker-port=0"),
                        *(f"--{n}={port}" for n, port in zip(names, free_ports(len(names)), strict=True)),
                    ],
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def drop(self, number: int = 0) -> None:
        """Kill a node that is not the head, with every process on it, at one instant."""
        node = self._others.pop(number)
        everything = [psutil.Process(node.pid), *descendants(node.pid)] if node.poll() is None else []
        kill(everything)
        node.wait()

    @property
    def pids(self) -> list[int]:
        """The top process of each node, the head first."""
        return [self.head, *(node.pid for node in self._others)]

    def __len__(self) -> int:
        return 1 + len(self._others)


@contextmanager
def several_nodes(count: int) -> Iterator[Nodes]:
    """A head and others, of one CPU each; the others may still be on their way."""
    with one_node_cluster(cpus=1) as (address, head), tempfile.TemporaryDirectory() as folder:
        nodes = Nodes(address, head, folder)
        try:
            for _ in range(count - 1):
                nodes.add()
            yield nodes
        finally:
            while len(nodes) > 1:
                nodes.drop()


def descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def workers(pid: int, *classes: str) -> list[psutil.Process]:
    """The actors below a process; Ray writes the class into their title."""
    titles = tuple(f"ray::{name}" for name in classes or ("Worker",))
    return [process for process in descendants(pid) if _title(process).startswith(titles)]


def is_agent(process: psutil.Process) -> bool:
    """One of the two processes that Ray keeps beside a node for its dashboard and environments."""
    return _title(process).startswith("ray::") and _title(process).endswith("Agent")


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()  # psutil compares start times: never a stranger who got the same id


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [
        process for process in processes if process.is_running() and _status(process) != psutil.STATUS_ZOMBIE
    ]


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
        return process.cmdline()[0]
    return ""


def _status(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.status()
    return psutil.STATUS_ZOMBIE


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now. The system hands them out above the range of Ray's workers."""
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
