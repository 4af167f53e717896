"""One driver per run directory; a dead driver holds no lock."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backlens.errors import BacklensError, Interrupted
from backlens.store import lock
from backlens.store.directory import Directory
from backlens.store.lock import DriverLock

HOLDER = """
import os, subprocess, sys, time
from backlens.store.directory import Directory
from backlens.store.lock import DriverLock

with DriverLock(Directory.at(sys.argv[1])):
    if sys.argv[2] == "waits":
        print(None, flush=True)
    if sys.argv[2] == "forks" and os.fork() == 0:
        print(os.getpid(), flush=True)
    if sys.argv[2] == "executes":
        print(subprocess.Popen(["sleep", "60"], close_fds=False).pid, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(out: Path, then: str = "waits") -> Iterator[tuple[subprocess.Popen, int | None]]:
    """Another process that holds the lock, and its child if it has one."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out), then], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    child = None if said == "None" else int(said)
    try:
        yield process, child
    finally:
        for pid in (process.pid, child):
            if pid is not None and _is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_second_driver_is_refused_and_told_who_holds_the_directory(tmp_path: Path):
    with (
        holder(tmp_path) as (process, _),
        pytest.raises(BacklensError) as refusal,
        DriverLock(Directory.at(tmp_path)),
    ):
        pass
    message = str(refusal.value)
    assert message.startswith(f"out: {tmp_path} is in use by another backlens run (")
    assert f", pid {process.pid})" in message
    assert message.endswith("; wait for it or choose another --out")
    assert refusal.value.status == 2


@pytest.mark.parametrize("then", ["waits", "forks", "executes"])
def test_a_killed_driver_holds_nothing_even_if_its_children_live(tmp_path: Path, then: str):
    with holder(tmp_path, then) as (process, child):
        process.kill()
        process.wait()
        with DriverLock(Directory.at(tmp_path)):
            assert child is None or _is_alive(child)


def test_a_lock_is_free_after_its_block_and_leaves_no_file(tmp_path: Path):
    directory = Directory.at(tmp_path / "new" / "run")
    for _ in range(2):
        with DriverLock(directory), pytest.raises(BacklensError, match="in use"), DriverLock(directory):
            pass
    assert directory.names() == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    directory = Directory.at(tmp_path)
    with pytest.raises(BacklensError) as refusal, DriverLock(directory):
        pass
    problem = f"out: cannot lock {tmp_path} ({os.strerror(number)})"
    assert str(refusal.value) == f"{problem}; use an --out on a file system that has locks"
    assert lock.find_holder(directory) is None
    with lock.exclusively(directory, "_commits.lock"):
        pass


@pytest.fixture
def store(tmp_path: Path) -> Directory:
    return Directory.at(f"memory://{tmp_path.name}")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are renewed, checked and stale within a fraction of a second."""
    for name, seconds in {"REFRESH_SECONDS": 0.05, "LOOK_SECONDS": 0.05, "STALE_SECONDS": 0.5}.items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.mark.usefixtures("hasty")
def test_object_stores_are_held_by_a_lease(store: Directory):
    with DriverLock(store):
        with pytest.raises(BacklensError, match="in use"), DriverLock(store):
            pass
        assert store.exists("_driver.lock")
    assert not store.exists("_driver.lock")
    with DriverLock(store):
        pass


@pytest.mark.usefixtures("hasty")
def test_a_killed_drivers_lease_is_waited_for(store: Directory):
    killed = {"host": "elsewhere", "pid": 1, "token": "theirs", "refreshed_at": time.time()}
    store.write_atomically("_driver.lock", json.dumps(killed).encode())
    with DriverLock(store):
        assert time.time() - killed["refreshed_at"] > 0.5
        assert json.loads(store.read("_driver.lock"))["token"] != "theirs"


def test_a_stale_lease_is_taken_over(store: Directory):
    long_ago = {"host": "elsewhere", "pid": 1, "token": "theirs", "refreshed_at": time.time() - 61}
    store.write_atomically("_driver.lock", json.dumps(long_ago).encode())
    with DriverLock(store):
        assert json.loads(store.read("_driver.lock"))["token"] != "theirs"


def test_a_lease_is_kept_fresh_and_its_loss_is_noticed(store: Directory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.05)
    with DriverLock(store) as held:
        first = json.loads(store.read("_driver.lock"))["refreshed_at"]
        _wait_until(lambda: json.loads(store.read("_driver.lock"))["refreshed_at"] > first)
        assert not held.lost
        theirs = {"host": "elsewhere", "pid": 1, "token": "theirs", "refreshed_at": time.time()}
        held.confirm()
        _wait_until(lambda: _put_until_lost(store, held, theirs))
        with pytest.raises(Interrupted, match="was taken over by another backlens run"):
            held.confirm()
    assert json.loads(store.read("_driver.lock"))["token"] == "theirs"


def _put_until_lost(store: Directory, held: DriverLock, theirs: dict) -> bool:
    if not held.lost:
        store.write_atomically("_driver.lock", json.dumps(theirs).encode())
    return held.lost


def _wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
