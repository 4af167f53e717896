"""A directory on a local disk or in an object store: how files get into it, and how requests to a store are retried.

Every file is first written whole under a local name (`stage`). Then it is published under its final name in one step:
by fsync and rename on a local disk, by a single put in an object store, which has no rename and shows an object only
when its upload is complete. So a reader finds a file whole or not at all.

The stores' own libraries retry first: s3fs a read that breaks, and botocore below it (as gcsfs and adlfs do) a request
that was throttled, refused for now or cut off, after growing random waits. `ask` retries what they let through, such as
a truncated listing or a longer outage. It gives a store up that has not answered for about a minute.
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

import fsspec
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from backlens.errors import BacklensError, Interrupted

Reply = TypeVar("Reply")

TRIES = 3
WAIT_SECONDS = 2.0
"""Mean wait before the second try; the wait before the third is twice as long."""
S3_ATTEMPTS = 4
"""Attempts of botocore per request; s3fs repeats a request that was throttled or cut off up to five times."""

# By module: `ask` does not import the libraries of stores that are not in use.
_FAILURES = {
    "aiohttp": "ClientError",
    "azure.core.exceptions": "AzureError",
    "botocore.exceptions": "BotoCoreError",
    "botocore.parsers": "ResponseParserError",
    "gcsfs.retry": "HttpError",
}
"""Errors that the libraries of object stores raise besides OSError."""
_REFUSALS = {
    "azure.core.exceptions": "ClientAuthenticationError",
    "botocore.exceptions": "NoCredentialsError",
    "google.auth.exceptions": "GoogleAuthError",
}
"""Errors of missing rights, which another try does not solve."""


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it. fsspec caches the instances.

    Raises BacklensError where fsspec does not know the protocol or lacks its package.
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
    """Options for botocore: `standard` waits at random up to 1, 2, 4 … seconds. Its own variables take precedence."""
    given = {"AWS_RETRY_MODE": ("mode", "standard"), "AWS_MAX_ATTEMPTS": ("total_max_attempts", S3_ATTEMPTS)}
    retries = dict(option for variable, option in given.items() if variable not in os.environ)
    return {"config_kwargs": {"retries": retries}} if retries else {}


def ask(call: Callable[[], Reply], where: str) -> Reply:
    """Send a request to a store, and retry it while it fails for a reason that may pass.

    FileNotFoundError and FileExistsError are results and are raised as they are. Raises BacklensError where the user's
    rights or credentials do not suffice, Interrupted where the store goes on failing.
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
    """Types of error that a request to a store can raise."""
    return OSError, *_imported(_FAILURES), *_imported(_REFUSALS)


def _imported(names: dict[str, str]) -> tuple[type[Exception], ...]:
    return tuple(
        getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules
    )


def reason(error: BaseException) -> str:
    """Message of a store's library, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


FULL = (errno.ENOSPC, errno.EDQUOT)
BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
"""Protocols of stores without folders. Their libraries would create a missing bucket on `makedirs`."""


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory by its URL: two strings and no open connection, so it can be sent to other processes."""

    root: str
    """An absolute local path, or a URL such as `s3://bucket/run`."""
    given: str
    """The path or URL as the user wrote it, for messages."""

    @classmethod
    def at(cls, out: "str | os.PathLike[str] | Directory") -> "Directory":
        """The directory at a path (a relative one becomes absolute) or at a URL such as `s3://bucket/run`."""
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
        """The fsspec file system of the directory."""
        return file_system(self.root)[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def child(self, name: str) -> "Directory":
        return Directory(self.location(name), posixpath.join(self.given, name))

    def location(self, name: str) -> str:
        """The absolute path or URL of a file in this directory, for DuckDB and `fsspec.open`."""
        return posixpath.join(self.root, name)

    def path(self, name: str = "") -> str:
        """The path of a file (or of the directory) without the protocol, for `fs`."""
        return file_system(self.location(name) if name else self.root)[1]

    def open(self, name: str, mode: str = "rb") -> IO[Any]:
        return cast(IO[Any], self._ask(name, self.fs.open, self.path(name), mode))

    def read(self, name: str) -> bytes:
        return cast(bytes, self._ask(name, self.fs.cat_file, self.path(name)))

    def read_all(self, names: list[str]) -> dict[str, bytes]:
        """The contents of several small files by name, fetched at the same time where the store can."""
        if not names:
            return {}
        contents = self._ask(names[0], self._contents, [self.path(name) for name in names])
        return dict(zip(names, contents, strict=True))

    def _contents(self, paths: list[str]) -> list[bytes]:
        # `cat` would read `[`, `*` and `?` in the names of folders as a pattern.
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
        """The sorted names in this directory or in a folder of it; empty if it does not exist."""
        self._forget_listing()
        try:
            found = self._ask(name, self.fs.ls, self.path(name), False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(posixpath.basename(path.rstrip("/")) for path in found)

    def sizes(self, name: str) -> dict[str, int]:
        """Size in bytes by name, of the files in a folder of this directory; empty if it does not exist."""
        self._forget_listing()
        try:
            found = self._ask(name, self.fs.ls, self.path(name), True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {
            posixpath.basename(each["name"]): each["size"] for each in found if each["type"] != "directory"
        }

    def makedirs(self, name: str = "") -> None:
        """Create the directory, or a folder in it; nothing in object stores, where the user creates the bucket."""
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
        """Write a small file, whole or not at all. It replaces an older file of that name."""
        self.publish(self.stage(name, lambda file: file.write(content)))

    def create(self, name: str, content: bytes) -> None:
        """Write a small file as `write_atomically` does, but leave an existing file of that name as it is.

        This is one step on local disks and on stores with a conditional put (S3, Google Cloud Storage, Azure). On other
        stores two processes can write at the same moment: read the file to know whose it is.
        """
        staged = self.stage(name, lambda file: file.write(content))
        with self.writing(name), ExitStack() as ending, suppress(FileExistsError):
            ending.callback(staged.discard)
            self._put(staged, os.link, "create")

    def stage(self, name: str, write: Callable[[IO[bytes]], object]) -> "Staged":
        """Write a file under a temporary local name and fsync it; `publish` gives it its final name."""
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
        """Give the staged file its final name in one step that survives a power cut."""
        with self.writing(staged.name), ExitStack() as ending:
            ending.callback(staged.discard)
            self._put(staged, os.replace, "overwrite")

    def _put(self, staged: "Staged", rename: Callable[[str, str], None], mode: str) -> None:
        """Rename on a local disk, or put in fsspec's `mode` in a store."""
        final = self.path(staged.name)
        if self.is_local:
            rename(staged.local_path, final)
            sync_folder(os.path.dirname(final))
        else:
            put_file = functools.partial(self.fs.put_file, mode=mode)
            self._ask(staged.name, put_file, staged.local_path, final)

    def remove_leftovers(self) -> list[str]:
        """Delete the temporary files of killed processes. Only the driver that holds the lock may call it."""
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
        """Turn an OSError of the block into a BacklensError that says what the user can do."""
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

    def _ask(self, name: str, call: Callable[..., Reply], *arguments: object) -> Reply:
        """Send one request about a file; only requests to stores are retried."""
        if self.is_local:
            return call(*arguments)
        return ask(functools.partial(call, *arguments), f"out: {self}/{name}".rstrip("/"))

    def _forget_listing(self) -> None:
        # File systems of object stores cache listings, and other processes write here.
        self.fs.invalidate_cache()


@dataclass(frozen=True, slots=True)
class Staged:
    """A complete, fsynced file under a temporary name, and its final name."""

    local_path: str
    name: str

    def discard(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.local_path)


def is_temporary(name: str) -> bool:
    """True for the name of a temporary file."""
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


def sync_folder(folder: str) -> None:
    """Make a rename in a local folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
