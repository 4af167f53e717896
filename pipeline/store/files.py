"""A directory on a local disk or an object store, and the one way in which files get into it.

Every file is first made whole under a local name (`stage`) and then published under its final name in one
step: on a local disk by fsync and rename, on an object store by a single put, since stores have no rename
and show an object only when its upload is complete. A reader therefore finds a file whole or not at all.
"""

import fcntl
import os
import posixpath
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import BacklensError, Interrupted


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
            filesystem, path = url_to_fs(given)
        except (ValueError, ImportError) as error:
            raise BacklensError(f"out: cannot use {given}: {error}") from error
        if isinstance(filesystem, LocalFileSystem):
            return cls(os.path.abspath(path), given)
        return cls(filesystem.unstrip_protocol(path), given)

    def __str__(self) -> str:
        return self.given

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """fsspec caches instances, so asking again is cheap."""
        return url_to_fs(self.root)[0]

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
        return url_to_fs(self.location(name) if name else self.root)[1]

    def open(self, name: str, mode: str = "rb") -> IO[Any]:
        return cast(IO[Any], self.fs.open(self.path(name), mode))

    def read(self, name: str) -> bytes:
        return cast(bytes, self.fs.cat_file(self.path(name)))

    def read_all(self, names: list[str]) -> dict[str, bytes]:
        """Several small files, fetched at the same time where the store allows it."""
        paths = {self.path(name): name for name in names}
        if not paths:
            return {}
        contents = cast(dict[str, bytes], self.fs.cat(list(paths)))
        return {paths[path]: content for path, content in contents.items()}

    def size(self, name: str) -> int:
        return self.fs.info(self.path(name))["size"]

    def exists(self, name: str = "") -> bool:
        self._forget_listing()
        return self.fs.exists(self.path(name))

    def names(self, name: str = "") -> list[str]:
        """The names in this directory or in a folder of it, sorted; none if it does not exist."""
        self._forget_listing()
        try:
            found = self.fs.ls(self.path(name), detail=False)
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(path.rstrip("/")) for path in found)

    def makedirs(self, name: str = "") -> None:
        try:
            self.fs.makedirs(self.path(name), exist_ok=True)
        except OSError as error:
            raise BacklensError(f"out: cannot create {self.given}: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def write_atomically(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all; an older one of that name is replaced."""
        staged = self.stage(name, lambda file: file.write(content))
        self.publish(staged)

    def stage(self, name: str, write: Callable[[IO[bytes]], object]) -> "Staged":
        """Writes a file under a temporary local name, durably; `publish` gives it its own."""
        with self._writing(name):
            staged = Staged(self._temporary_path(name), name)
            try:
                with open(staged.local_path, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                staged.discard()
                raise
            return staged

    def publish(self, staged: "Staged") -> None:
        """The staged file appears under its final name, and stays there through a power cut."""
        with self._writing(staged.name):
            final = self.path(staged.name)
            if self.is_local:
                os.replace(staged.local_path, final)
                sync_folder(os.path.dirname(final))
            else:
                self.fs.put_file(staged.local_path, final)
                staged.discard()

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
        descriptor = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _temporary_path(self, name: str) -> str:
        if not self.is_local:
            return os.path.join(tempfile.gettempdir(), f"backlens-{uuid.uuid4().hex}.tmp")
        folder, base = os.path.split(self.path(name))
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
            sync_folder(os.path.dirname(folder))
        return os.path.join(folder, f".{base}.{uuid.uuid4().hex}.tmp")

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turns what the system says into what the user can do."""
        try:
            yield
        except PermissionError as error:
            raise BacklensError(
                f"out: may not write {self}/{name} ({error}); choose another --out"
            ) from error
        except OSError as error:
            raise Interrupted(
                f"out: cannot write {self}/{name} ({error}); mend that and run the same command again"
            ) from error

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


def sync_folder(folder: str) -> None:
    """Makes a rename in a local folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
