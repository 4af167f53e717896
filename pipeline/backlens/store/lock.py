"""Locks: one driver per run directory, and one process at a time in a block.

On a local disk the kernel keeps the lock (`filelock`) and releases it when its holder dies, in whatever way.

Object stores have no locks. There the driver holds a lease, which it renews. Another driver that finds a lease waits:
it is refused as soon as the lease is renewed, and takes the lease over once it is stale, a minute after a kill at most.
Two drivers that take over one lease at the same moment may both believe that they hold it, until the next renewal: then
one of them finds that it has `lost` the lease, and ends. Until then they write the same rows.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import filelock

from backlens.errors import BacklensError, Interrupted
from backlens.printable import json_text
from backlens.store.directory import FULL, Directory

LOCK_FILE = "_driver.lock"
REFRESH_SECONDS = 10.0
STALE_SECONDS = 60.0
"""Age at which a lease is stale: longer than an outage that a driver survives, plus some seconds between clocks."""
LOOK_SECONDS = 2.0
"""Interval at which a waiting driver checks whether the lease is renewed."""
FILE_SECONDS = 0.05
"""Wait for a file's lock. It is not 0, because `find_holder` holds the lock for an instant."""


def file_lock(path: str, **options: Any) -> filelock.FileLock:
    """A lock that the kernel keeps and releases when its holder dies; a forked child does not share it.

    `acquire` raises OSError on a file system without locks (`has_no_locks`): the marker file that `filelock` could use
    there would outlive a killed process.
    """
    return filelock.FileLock(path, poll_interval=0.01, thread_local=False, fallback_to_soft=False, **options)


def has_no_locks(error: OSError) -> bool:
    """True for an error of the locking itself, whose number depends on the file system. It names no file, unlike an
    error of opening the lock file."""
    return error.filename is None


@contextlib.contextmanager
def exclusively(directory: Directory, name: str) -> Iterator[None]:
    """Let one process at a time into the block, by a lock on the file `name` of the directory.

    Object stores and file systems without locks cannot give this guarantee; there this does nothing.
    """
    if not directory.is_local:
        yield
        return
    lock = file_lock(directory.path(name))
    with directory.writing(name):
        try:
            lock.acquire()
        except OSError as error:
            if not has_no_locks(error):
                raise
    try:
        yield
    finally:
        lock.release()


class DriverLock:
    """The lock of a run directory, for a `with` block. Raises BacklensError while another process holds it.

    If the block raises before anything is written, the folders that the lock created are removed.
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
        with contextlib.suppress(OSError):  # a folder that holds something stays
            for folder in self._made:
                os.rmdir(folder)

    @property
    def lost(self) -> bool:
        """True once another driver has taken over the lease of an object store, as after a pause of a minute."""
        return self._lock.lost

    def confirm(self) -> None:
        """Raise Interrupted if the lock is lost, because the run is then the other driver's."""
        if self.lost:
            raise Interrupted(
                f"out: {self.directory} was taken over by another backlens run while this one was out of reach; "
                "let that one finish, or stop it and run the same command again"
            )


def _missing_folders(path: str) -> list[str]:
    """This folder and its parents, as far as they do not exist; the folder first."""
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
                if error.errno in FULL or not has_no_locks(error):
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
    """A record in an object store that its holder renews every `REFRESH_SECONDS`."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.token = uuid.uuid4().hex
        self.since = _now()
        self.lost = False
        self._stopped = threading.Event()
        self._refreshing = threading.Thread(target=self._refresh, name="driver-lease", daemon=True)

    def acquire(self) -> None:
        current = self._read()
        if current is not None:
            self._outwait(current)
            self.directory.remove(LOCK_FILE)
        self.directory.create(LOCK_FILE, self._content())
        current = self._read()
        if current is None or current["token"] != self.token:  # two drivers started at the same moment
            raise BacklensError(_in_use(self.directory, json_text(current or {}).encode()))
        self._refreshing.start()

    def _outwait(self, current: dict[str, Any]) -> None:
        """Wait until the lease is stale. Raises BacklensError as soon as its holder renews it."""
        while (left := float(current["refreshed_at"]) + STALE_SECONDS - time.time()) > 0:
            time.sleep(min(left, LOOK_SECONDS))
            now = self._read()
            if now is None:
                return
            if now != current:
                raise BacklensError(_in_use(self.directory, json_text(now).encode()))

    def release(self) -> None:
        self._stopped.set()
        self._refreshing.join()
        if not self.lost:
            # If the store does not answer, the lease ends by itself; the error to show is the one that ends the run.
            with contextlib.suppress(BacklensError):
                self.directory.remove(LOCK_FILE)

    def _refresh(self) -> None:
        while not self._stopped.wait(REFRESH_SECONDS):
            # The store may answer at the next turn; the lease lasts for several.
            with contextlib.suppress(BacklensError):
                current = self._read()
                if current is not None and current["token"] != self.token:
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
    """The process that drives a run."""

    host: str
    pid: int
    since: str
    """ISO 8601, UTC."""


def find_holder(directory: Directory) -> Holder | None:
    """The process that drives the run in this directory now, or None."""
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
        who = ""  # its holder has not written the record yet
    return f"out: {directory} is in use by another backlens run{who}; wait for it or choose another --out"
