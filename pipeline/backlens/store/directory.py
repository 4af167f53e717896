"""File systems by URL, and the one place where a request to an object store is tried again or given up.

The stores' own libraries try again first: s3fs what breaks while it reads, and beneath it botocore (as gcsfs and
adlfs do) whatever was throttled, refused for now or cut off, after growing random waits. `ask` is for what they
let through, a truncated listing for instance, and for outages that they do not outlast. A store that does not
answer at all is so given up after about a minute.

A directory on a local disk or an object store, and the one way in which files get into it.

Every file is first made whole under a local name (`stage`) and then published under its final name in one
step: on a local disk by fsync and rename, on an object store by a single put, since stores have no rename
and show an object only when its upload is complete. A reader therefore finds a file whole or not at all.
"""

import errno
import functools
import os
import posixpath
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, TypeVar, cast

import filelock
import fsspec
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from backlens.errors import BacklensError, Interrupted

Reply = TypeVar("Reply")

TRIES = 3
WAIT_SECONDS = 2.0
"""Before the second try, on average; twice that before the third."""
S3_ATTEMPTS = 4
"""botocore's, at each request; s3fs repeats those of them up to five times that were throttled or cut off."""

# By module, as `ask` should not import the libraries of stores that nobody uses.
_FAILURES = {
    "aiohttp": "ClientError",
    "azure.core.exceptions": "AzureError",
    "botocore.exceptions": "BotoCoreError",
    "botocore.parsers": "ResponseParserError",
    "gcsfs.retry": "HttpError",
}
"""What the libraries of object stores raise besides OSError."""
_REFUSALS = {
    "azure.core.exceptions": "ClientAuthenticationError",
    "botocore.exceptions": "NoCredentialsError",
    "google.auth.exceptions": "GoogleAuthError",
}
"""Those of them that no second try mends."""


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path there. fsspec caches instances, so asking again is cheap.

    Raises BacklensError where fsspec knows no such protocol or lacks its package.
    """
    if "://" not in url:  # `url_to_fs` would read a name with `::` in it as a chain of file systems
        local = LocalFileSystem()
        return local, local._strip_protocol(url)
    options = _s3_options() if split_protocol(url)[0] in ("s3", "s3a") else {}
    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        extra = ' (pip install "backlens[s3]")' if options else ""
        raise BacklensError(f"cannot use {url}: {error}{extra}") from error
    except ValueError as error:
        raise BacklensError(f"cannot use {url}: {error}") from error


def _s3_options() -> dict[str, Any]:
    """`standard` waits at random up to 1, 2, 4 … seconds. botocore's own variables have the last word."""
    given = {"AWS_RETRY_MODE": ("mode", "standard"), "AWS_MAX_ATTEMPTS": ("total_max_attempts", S3_ATTEMPTS)}
    retries = dict(option for variable, option in given.items() if variable not in os.environ)
    return {"config_kwargs": {"retries": retries}} if retries else {}


def ask(call: Callable[[], Reply], where: str) -> Reply:
    """What `call` asks of a store, tried again if it fails for a reason that may pass.

    FileNotFoundError and FileExistsError are answers, and the caller's affair. Raises BacklensError
    where the user's rights or credentials do not do, Interrupted where the store goes on failing.
    """
    for number in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, FileExistsError):
            raise
        except (PermissionError, *_imported(_REFUSALS)) as error:
            raise BacklensError(f"{where}: {reason(error)}; see that the credentials are right") from error
        except store_errors() as error:
            if number + 1 == TRIES:
                raise Interrupted(
                    f"{where}: the store fails ({reason(error)}); run the same command again when it answers"
                ) from error
        time.sleep(WAIT_SECONDS * 2**number * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def store_errors() -> tuple[type[Exception], ...]:
    """What a request to a store may raise."""
    return OSError, *_imported(_FAILURES), *_imported(_REFUSALS)


def _imported(names: dict[str, str]) -> tuple[type[Exception], ...]:
    return tuple(
        getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules
    )


def reason(error: BaseException) -> str:
    """What a store's library says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


Answer = TypeVar("Answer")
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""
BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
"""Protocols of stores without folders, whose libraries would make a missing bucket if they were asked for one."""


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory by its URL: two strings and no open connection, so it travels to other processes."""

    root: str
    """An absolute local path, or a URL such as `s3://bucket/run`."""
    given: str
    """The same as the user wrote it, for messages."""

    @classmethod
    def at(cls, out: "str | os.PathLike[str] | Directory") -> "Directory":
        """A path (a relative one becomes absolute here) or a URL such as `s3://bucket/run`."""
        if isinstance(out, Directory):
            return out
        given = os.fspath(out)
        try:
            filesystem, path = file_system(given)
        except BacklensError as error:
            raise BacklensError(f"out: {error}") from error
        if isinstance(filesystem, LocalFileSystem):
            return cls(os.path.abspath(path), given)
        return cls(filesystem.unstrip_protocol(path), given)

    def __str__(self) -> str:
        return self.given

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system that it is in, for libraries that are given one."""
        return file_system(self.root)[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def child(self, name: str) -> "Directory":
        return Directory(self.location(name), posixpath.join(self.given, name))

    def location(self, name: str) -> str:
        """The absolute path or URL of a file in this directory: what DuckDB or `fsspec.open` are given."""
        return posixpath.join(self.root, name)

    def path(self, name: str = "") -> str:
        """The same as `fs` wants it: without the protocol."""
        return file_system(self.location(name) if name else self.root)[1]

    def open(self, name: str, mode: str = "rb") -> IO[Any]:
        return cast(IO[Any], self._ask(name, self.fs.open, self.path(name), mode))

    def read(self, name: str) -> bytes:
        return cast(bytes, self._ask(name, self.fs.cat_file, self.path(name)))

    def read_all(self, names: list[str]) -> dict[str, bytes]:
        """Several small files, fetched at the same time where the store allows it."""
        if not names:
            return {}
        contents = self._ask(names[0], self._contents, [self.path(name) for name in names])
        return dict(zip(names, contents, strict=True))

    def _contents(self, paths: list[str]) -> list[bytes]:
        # Not `cat`, which reads `[`, `*` and `?` in the names of folders as a pattern.
        found = self.fs.cat_ranges(paths, None, None)
        for content in found:
            if isinstance(content, Exception):
                raise content
        return found

    def size(self, name: str) -> int:
        return self._ask(name, self.fs.info, self.path(name))["size"]

    def exists(self, name: str = "") -> bool:
        self._forget_listing()
        return self._ask(name, self.fs.exists, self.path(name))

    def names(self, name: str = "") -> list[str]:
        """The names in this directory or in a folder of it, sorted; none if it does not exist."""
        self._forget_listing()
        try:
            found = self._ask(name, self.fs.ls, self.path(name), False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(posixpath.basename(path.rstrip("/")) for path in found)

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes by name of the files in a folder of this directory; none if it does not exist."""
        self._forget_listing()
        try:
            found = self._ask(name, self.fs.ls, self.path(name), True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {
            posixpath.basename(each["name"]): each["size"] for each in found if each["type"] != "directory"
        }

    def makedirs(self, name: str = "") -> None:
        """Object stores have no folders: a name is made with its file, and a bucket is its owner's to make."""
        if self.root.partition("://")[0] in BUCKETS:
            return
        try:
            self._ask(name, self.fs.makedirs, self.path(name), True)
        except (FileExistsError, NotADirectoryError) as error:
            raise BacklensError(f"out: {self.given} is a file, or lies in one; choose a directory") from error
        except OSError as error:
            if error.errno in FULL:
                raise self._full(name, error) from error
            raise BacklensError(f"out: cannot create {self.given}: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._ask(name, self.fs.rm_file, self.path(name))

    def write_atomically(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all; an older one of that name is replaced."""
        self.publish(self.stage(name, lambda file: file.write(content)))

    def create(self, name: str, content: bytes) -> None:
        """As `write_atomically`, unless a file of that name is there, which then stays.

        In one step on stores that can put an object on that condition (S3, Google Cloud Storage, Azure); on others
        two may write at the same moment. So whoever has to know which file it is reads it.
        """
        staged = self.stage(name, lambda file: file.write(content))
        with self.writing(name), ExitStack() as ending, suppress(FileExistsError):
            ending.callback(staged.discard)
            self._put(staged, os.link, "create")

    def stage(self, name: str, write: Callable[[IO[bytes]], object]) -> "Staged":
        """Writes a file under a temporary local name, durably; `publish` gives it its own."""
        with self.writing(name), ExitStack() as undoing:
            staged = Staged(self._temporary_path(name), name)
            undoing.callback(staged.discard)
            with open(staged.local_path, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            undoing.pop_all()
            return staged

    def publish(self, staged: "Staged") -> None:
        """The staged file appears under its final name, and stays there through a power cut."""
        with self.writing(staged.name), ExitStack() as ending:
            ending.callback(staged.discard)
            self._put(staged, os.replace, "overwrite")

    def _put(self, staged: "Staged", rename: Callable[[str, str], None], mode: str) -> None:
        """One step: a rename on a local disk, a put in fsspec's `mode` on a store."""
        final = self.path(staged.name)
        if self.is_local:
            rename(staged.local_path, final)
            sync_folder(os.path.dirname(final))
        else:
            put_file = functools.partial(self.fs.put_file, mode=mode)
            self._ask(staged.name, put_file, staged.local_path, final)

    def remove_leftovers(self) -> list[str]:
        """Deletes what killed processes left half-written. Only for the driver that holds the lock."""
        if not self.is_local:
            return []
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(self.root)
            for name in names
            if is_temporary(name)
        ]
        for path in found:
            with suppress(FileNotFoundError):
                os.unlink(path)
        return found

    @contextmanager
    def exclusively(self, name: str) -> Iterator[None]:
        """One process at a time, by a lock on the file `name`; the kernel releases it when its holder dies.

        Object stores and file systems without locks give no such guarantee; there this does nothing.
        """
        if not self.is_local:
            yield
            return
        lock = file_lock(self.path(name))
        with self.writing(name):
            try:
                lock.acquire()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        try:
            yield
        finally:
            lock.release()

    def _temporary_path(self, name: str) -> str:
        if not self.is_local:
            return os.path.join(tempfile.gettempdir(), f"backlens-{uuid.uuid4().hex}.tmp")
        folder, base = os.path.split(self.path(name))
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
            sync_folder(os.path.dirname(folder))
        return os.path.join(folder, f".{base}.{uuid.uuid4().hex}.tmp")

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turns what the system says into what the user can do."""
        try:
            yield
        except PermissionError as error:
            raise BacklensError(
                f"out: may not write {self}/{name} ({error}); choose another --out"
            ) from error
        except OSError as error:
            if error.errno in FULL:
                raise self._full(name, error) from error
            if isinstance(error, FileNotFoundError) and not self.is_local:
                raise BacklensError(
                    f"out: cannot write {self}/{name}: {reason(error)}; make the bucket or choose another --out"
                ) from error
            raise Interrupted(
                f"out: cannot write {self}/{name} ({error}); mend that and run the same command again"
            ) from error

    def _full(self, name: str, error: OSError) -> Interrupted:
        disk = self.root if self.is_local else tempfile.gettempdir()
        return Interrupted(
            f"out: cannot write {self}/{name} ({error}); "
            f"make room on the disk of {disk} and run the same command again"
        )

    def _ask(self, name: str, call: Callable[..., Answer], *arguments: object) -> Answer:
        """One request about a file; on a local disk there is nobody to be asked twice."""
        if self.is_local:
            return call(*arguments)
        return ask(functools.partial(call, *arguments), f"out: {self}/{name}".rstrip("/"))

    def _forget_listing(self) -> None:
        # Object-store file systems remember listings; other processes write here, so ours would be stale.
        self.fs.invalidate_cache()


@dataclass(frozen=True, slots=True)
class Staged:
    """A file that is complete and durable under a temporary name, and is to be called `name`."""

    local_path: str
    name: str

    def discard(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.local_path)


def is_temporary(name: str) -> bool:
    """Whether a file's name says that it was never finished."""
    return name[:1] in (".", "_") and name.endswith(".tmp")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a temporary path beside `path`; what the block writes there takes the name `path`, whole or not at all."""
    folder, name = os.path.split(os.fspath(path))
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def file_lock(path: str, **options: Any) -> filelock.FileLock:
    """A lock that the kernel keeps and releases when its holder dies; a forked child does not share it.

    Taking it raises OSError with one of `NO_LOCKS` on a file system without locks: `filelock` would fall back on a
    marker file there, which outlives a killed process.
    """
    return filelock.FileLock(path, poll_interval=0.01, thread_local=False, fallback_to_soft=False, **options)


def sync_folder(folder: str) -> None:
    """Makes a rename in a local folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
