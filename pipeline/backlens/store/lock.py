"""One driver per run directory.

On a local disk the lock is the kernel's: it is gone with the process that holds it, however that ended.
An object store has no locks, so there the driver keeps a lease fresh. Another driver waits to see whether
somebody does: it is refused as soon as the lease is renewed, and takes it over once it is stale, a minute after
a kill at most. Two that take over the same lease at the same moment may both believe that they have it, until
the next renewal: then one of them finds that it has `lost` it and ends. Meanwhile they write the same rows.
"""

import contextlib
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

import filelock

from backlens.errors import BacklensError, Interrupted
from backlens.printable import json_text
from backlens.store.directory import NO_LOCKS, Directory, file_lock

LOCK_FILE = "_driver.lock"
REFRESH_SECONDS = 10.0
STALE_SECONDS = 60.0
"""Longer than a store's outage that a driver survives, with the clocks of two machines a few seconds apart."""
LOOK_SECONDS = 2.0
"""How often a driver that waits for a lease to end looks whether it is kept fresh."""
FILE_SECONDS = 0.05
"""Wait for a file's lock: `find_holder` holds it for an instant while it looks."""


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
    """The kernel's lock on the lock file (`filelock`), which also holds the record of its holder."""

    lost = False

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self._path = directory.path(LOCK_FILE)
        self._lock = file_lock(self._path, timeout=FILE_SECONDS, on_acquired=_record_holder)

    def acquire(self) -> None:
        with self.directory.writing(LOCK_FILE):
            try:
                self._lock.acquire()
            except filelock.Timeout:
                raise BacklensError(_in_use(self.directory, _content(self.directory) or b"")) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                raise BacklensError(
                    f"out: cannot lock {self.directory} ({error.strerror}); "
                    "use an --out on a file system that has locks"
                ) from error

    def release(self) -> None:
        if not self._lock.is_locked:
            return  # this is a forked child that leaves the block: the lock is its parent's
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # while it is locked: a process that waits for it then makes a new file
        self._lock.release()


def _record_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _holder(_now()), 0)


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
        content = _content(self.directory)
        return None if content is None else json.loads(content)

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
    """The lock file's content while it is locked; None if it is not, as after its holder was killed.

    None too where the file system has no locks, because no driver works there, and where the file may not be read.
    """
    try:
        descriptor = os.open(directory.path(LOCK_FILE), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        is_free = filelock.lock_descriptor(descriptor, blocking=False)
        return None if is_free else os.pread(descriptor, 4096, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _held_lease(directory: Directory) -> bytes | None:
    content = _content(directory)
    if content is None:
        return None
    try:
        ends = float(json.loads(content)["refreshed_at"]) + STALE_SECONDS
    except (ValueError, TypeError, KeyError):
        return None
    return content if ends > time.time() else None


def _content(directory: Directory) -> bytes | None:
    try:
        return directory.read(LOCK_FILE)
    except FileNotFoundError:
        return None


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
