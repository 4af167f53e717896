"""One driver per run directory.

On a local disk the lock is the kernel's: it is gone with the process that holds it, however that ended.
An object store has no locks, so there the driver keeps a lease fresh, and another may take it over once
it is stale.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from pipeline.errors import BacklensError
from pipeline.store.files import Directory

LOCK_FILE = "_driver.lock"
REFRESH_SECONDS = 10.0
STALE_SECONDS = 60.0
LOOKS = 5
"""How often a driver tries for a file's lock: `find_holder` may have it for the instant of a look."""

# A fork shares the lock of its parent and would keep it after the parent's death, so children let go of it.
# Executed programs (Ray's workers) never get it: the descriptors are close-on-exec.
_held_descriptors: set[int] = set()


def _let_go_in_child() -> None:
    for descriptor in _held_descriptors:
        os.close(descriptor)
    _held_descriptors.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


class DriverLock:
    """`with DriverLock(directory): …`; refused with a BacklensError while another process holds it."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self._lock: _FileLock | _Lease = _FileLock(directory) if directory.is_local else _Lease(directory)

    def __enter__(self) -> "DriverLock":
        self.directory.makedirs()
        self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    @property
    def lost(self) -> bool:
        """Whether another driver took over an object store's lease, which can follow a pause of a minute."""
        return self._lock.lost


class _FileLock:
    lost = False

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.path = directory.path(LOCK_FILE)
        self.descriptor = -1

    def acquire(self) -> None:
        looks = 0
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 4096, 0)
                os.close(descriptor)
                looks += 1
                if looks == LOOKS:
                    raise BacklensError(_in_use(self.directory, holder)) from None
                time.sleep(0.01)
                continue
            except OSError as error:
                os.close(descriptor)
                raise BacklensError(
                    f"out: cannot lock {self.directory} ({error.strerror}); "
                    "use an --out on a file system that has locks"
                ) from error
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # its holder removed the file on leaving, between our open and our lock
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _holder(_now()), 0)
        _held_descriptors.add(descriptor)
        self.descriptor = descriptor

    def release(self) -> None:
        if self.descriptor not in _held_descriptors:
            return  # a forked child leaves the block: the lock is its parent's
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        _held_descriptors.discard(self.descriptor)
        os.close(self.descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


class _Lease:
    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.token = uuid.uuid4().hex
        self.since = _now()
        self.lost = False
        self._stopped = threading.Event()
        self._refreshing = threading.Thread(target=self._refresh, name="driver-lease", daemon=True)

    def acquire(self) -> None:
        standing = self._read()
        if standing is not None:
            seconds_left = float(standing["refreshed_at"]) + STALE_SECONDS - time.time()
            if seconds_left > 0:
                dead = f" (or, if that run is dead, {seconds_left:.0f} s)"
                raise BacklensError(_in_use(self.directory, json.dumps(standing).encode(), dead))
        self._write()
        standing = self._read()
        if standing is None or standing["token"] != self.token:  # two drivers started at the same moment
            raise BacklensError(_in_use(self.directory, json.dumps(standing or {}).encode()))
        self._refreshing.start()

    def release(self) -> None:
        self._stopped.set()
        self._refreshing.join()
        if not self.lost:
            self.directory.remove(LOCK_FILE)

    def _refresh(self) -> None:
        while not self._stopped.wait(REFRESH_SECONDS):
            # A store that does not answer now may answer at the next turn; the lease outlives five of them.
            with contextlib.suppress(OSError):
                standing = self._read()
                if standing is not None and standing["token"] != self.token:
                    self.lost = True
                    return
                self._write()

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.directory.read(LOCK_FILE))
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self.directory.write_atomically(
            LOCK_FILE, _holder(self.since, token=self.token, refreshed_at=time.time())
        )


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that drives a run now."""

    host: str
    pid: int
    since: str
    """ISO 8601, UTC."""


def find_holder(directory: Directory) -> Holder | None:
    """Who drives the run in this directory at this moment, if anybody does."""
    content = _held_file(directory) if directory.is_local else _held_lease(directory)
    try:
        fields = json.loads(content or b"{}")
        return Holder(str(fields["host"]), int(fields["pid"]), str(fields.get("since", "")))
    except (ValueError, KeyError, TypeError):
        return None


def _held_file(directory: Directory) -> bytes | None:
    """What the lock file says while it is locked; a file that a killed driver left is not."""
    try:
        descriptor = os.open(directory.path(LOCK_FILE), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 4096, 0)
    finally:
        os.close(descriptor)
    return None


def _held_lease(directory: Directory) -> bytes | None:
    try:
        content = directory.read(LOCK_FILE)
    except FileNotFoundError:
        return None
    return content if float(json.loads(content)["refreshed_at"]) + STALE_SECONDS > time.time() else None


def _holder(since: str, **fields: str | float) -> bytes:
    held = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    return json.dumps(held | fields).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _in_use(directory: Directory, holder: bytes, dead: str = "") -> str:
    try:
        fields = json.loads(holder)
        who = f" ({fields['host']}, pid {fields['pid']})"
    except (ValueError, KeyError, TypeError):
        who = ""  # its holder has only just opened the file
    return (
        f"out: {directory} is in use by another backlens run{who}; wait for it{dead} or choose another --out"
    )
