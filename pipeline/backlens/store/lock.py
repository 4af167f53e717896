"""One driver per run directory.

On a local disk the lock is the kernel's: it is gone with the process that holds it, however that ended.
An object store has no locks, so there the driver keeps a lease fresh. Another driver waits to see whether
somebody does: it is refused as soon as the lease is renewed, and takes it over once it is stale, a minute after
a kill at most. Two that take over the same lease at the same moment may both believe that they have it, until
the next renewal: then one of them finds that it has `lost` it and ends. Meanwhile they write the same rows.
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

from backlens.errors import BacklensError, Interrupted
from backlens.printable import json_text
from backlens.store.directory import Directory

LOCK_FILE = "_driver.lock"
REFRESH_SECONDS = 10.0
STALE_SECONDS = 60.0
"""Longer than a store's outage that a driver survives, with the clocks of two machines a few seconds apart."""
LOOK_SECONDS = 2.0
"""How often a driver that waits for a lease to end looks whether it is kept fresh."""
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
    """`with DriverLock(directory): …`; refused with a BacklensError while another process holds it.

    Directories that it made are gone again if the block raised before anything was written there.
    """

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self._made: list[str] = []
        self._lock: _FileLock | _Lease = _FileLock(directory) if directory.is_local else _Lease(directory)

    def __enter__(self) -> "DriverLock":
        self._made = _missing_folders(self.directory.path("")) if self.directory.is_local else []
        self.directory.makedirs()
        try:
            self._lock.acquire()
        except BaseException:
            self._remove_made()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        if error is not None:
            self._remove_made()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # it holds something: the error came later
            for folder in self._made:
                os.rmdir(folder)

    @property
    def lost(self) -> bool:
        """Whether another driver took over an object store's lease, which can follow a pause of a minute."""
        return self._lock.lost

    def confirm(self) -> None:
        """Raises Interrupted if the lock is lost: the run is the other driver's then."""
        if self.lost:
            raise Interrupted(
                f"out: {self.directory} was taken over by another backlens run while this one was out of reach; "
                "let that one finish, or stop it and run the same command again"
            )


def _missing_folders(path: str) -> list[str]:
    """The folders that have to be made for this one, itself first."""
    missing: list[str] = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


class _FileLock:
    lost = False

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.path = directory.path(LOCK_FILE)
        self.descriptor = -1

    def acquire(self) -> None:
        with self.directory.writing(LOCK_FILE):
            looks = 0
            while (holder := self._try()) is not None:
                looks += 1
                if looks == LOOKS:
                    raise BacklensError(_in_use(self.directory, holder))
                time.sleep(0.01)

    def _try(self) -> bytes | None:
        """Takes the lock, or says what its holder wrote."""
        while True:
            with contextlib.ExitStack() as undoing:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                undoing.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return os.pread(descriptor, 4096, 0)
                except OSError as error:
                    raise BacklensError(
                        f"out: cannot lock {self.directory} ({error.strerror}); "
                        "use an --out on a file system that has locks"
                    ) from error
                if not self._is_current(descriptor):
                    continue  # its holder removed the file on leaving, between our open and our lock
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _holder(_now()), 0)
                undoing.pop_all()
                _held_descriptors.add(descriptor)
                self.descriptor = descriptor
                return None

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
            self._outwait(standing)
            self.directory.remove(LOCK_FILE)
        self.directory.create(LOCK_FILE, self._content())
        standing = self._read()
        if standing is None or standing["token"] != self.token:  # two drivers started at the same moment
            raise BacklensError(_in_use(self.directory, json_text(standing or {}).encode()))
        self._refreshing.start()

    def _outwait(self, standing: dict[str, Any]) -> None:
        """Wait until a lease is stale that nobody keeps fresh; refuse as soon as somebody does."""
        while (left := float(standing["refreshed_at"]) + STALE_SECONDS - time.time()) > 0:
            time.sleep(min(left, LOOK_SECONDS))
            now = self._read()
            if now is None:
                return
            if now != standing:
                raise BacklensError(_in_use(self.directory, json_text(now).encode()))

    def release(self) -> None:
        self._stopped.set()
        self._refreshing.join()
        if not self.lost:
            # If the store does not answer, the lease ends by itself; why the run ends is more worth saying.
            with contextlib.suppress(BacklensError):
                self.directory.remove(LOCK_FILE)

    def _refresh(self) -> None:
        while not self._stopped.wait(REFRESH_SECONDS):
            # A store that does not answer now may answer at the next turn; the lease outlives a few of them.
            with contextlib.suppress(BacklensError):
                standing = self._read()
                if standing is not None and standing["token"] != self.token:
                    self.lost = True
                    return
                self.directory.write_atomically(LOCK_FILE, self._content())

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.directory.read(LOCK_FILE))
        except FileNotFoundError:
            return None

    def _content(self) -> bytes:
        return _holder(self.since, token=self.token, refreshed_at=time.time())


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
    """What the lock file says while it is locked; a file that a killed driver left is not.

    Where the file system has no locks nobody holds one, for no driver works there. A file that may not be read says
    nothing either.
    """
    try:
        descriptor = os.open(directory.path(LOCK_FILE), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 4096, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _held_lease(directory: Directory) -> bytes | None:
    try:
        content = directory.read(LOCK_FILE)
    except FileNotFoundError:
        return None
    try:
        ends = float(json.loads(content)["refreshed_at"]) + STALE_SECONDS
    except (ValueError, TypeError, KeyError):
        return None
    return content if ends > time.time() else None


def _holder(since: str, **fields: str | float) -> bytes:
    held = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    return json_text(held | fields).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _in_use(directory: Directory, holder: bytes) -> str:
    try:
        fields = json.loads(holder)
        who = f" ({fields['host']}, pid {fields['pid']})"
    except (ValueError, KeyError, TypeError):
        who = ""  # its holder has only just opened the file
    return f"out: {directory} is in use by another backlens run{who}; wait for it or choose another --out"
