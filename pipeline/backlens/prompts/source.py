"""A place to read from: a local path or any fsspec URL, compressed or not."""

import bz2
import codecs
import contextlib
import functools
import io
import itertools
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NoReturn, TypeVar

import fsspec
import fsspec.compression
import fsspec.utils

from backlens.errors import BacklensError
from backlens.store.directory import file_system, store_errors

_COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")

T = TypeVar("T")

# Errors of decompressors and file systems for damaged or missing data.
READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)

_BUFFER_BYTES = 1 << 20
_NAMES_SHOWN = 6
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Source:
    """A place to read from, and its short name for messages."""

    url: str
    """Path or URL as the user wrote it."""

    @functools.cached_property
    def _located(self) -> tuple[Any, str]:
        with self._reporting():
            return file_system(self.url)

    @property
    def name(self) -> str:
        """The last part of the path, which does not depend on the folder."""
        return one_line(self.url.rstrip("/").rsplit("/", 1)[-1])

    @property
    def suffix(self) -> str:
        """The suffix without that of a compression: `.jsonl` for `prompts.jsonl.gz`."""
        name = self.name.lower()
        if name.endswith(_COMPRESSION_SUFFIXES):
            name = name.rpartition(".")[0]
        _, dot, suffix = name.rpartition(".")
        return dot + suffix if dot else ""

    def exists(self) -> bool:
        file_system, path = self._located
        with self._reporting():
            return file_system.exists(path)

    def is_directory(self) -> bool:
        file_system, path = self._located
        with self._reporting():
            return file_system.isdir(path)

    def holds(self, *names: str) -> bool:
        """True if the directory holds a file with one of these names."""
        file_system, path = self._located
        return any(file_system.exists(f"{path.rstrip('/')}/{name}") for name in names)

    @contextmanager
    def open(self, *, decompress: bool = True) -> Iterator[IO[bytes]]:
        file_system, path = self._located
        with contextlib.ExitStack() as stack:
            with self._reporting():
                stream = stack.enter_context(file_system.open(path, "rb"))
                if decompress:
                    stream = stack.enter_context(_decompressed(stream, path))
            yield stream

    def lines(self) -> Iterator[bytes]:
        """The physical lines with their line breaks, without a byte order mark. Memory holds one line at a time."""
        with self.open() as stream:
            lines = iter(stream)
            for number in itertools.count(1):
                line = self._next_line(lines, number)
                if line is None:
                    return
                if number == 1 and line.startswith(_UTF16) and b"\0" in line:
                    raise BacklensError(
                        f"{self.name}: is UTF-16 or UTF-32, not UTF-8; save the file as UTF-8"
                    )
                yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line

    def _next_line(self, lines: Iterator[bytes], number: int) -> bytes | None:
        return self.reading(lambda: next(lines, None), f":{number}")

    def reading(self, read: Callable[[], T], place: str = "") -> T:
        """The result of `read`. Raises BacklensError that names the place for damaged or missing data."""
        try:
            return read()
        except (*READ_ERRORS, *store_errors()) as error:
            self.fail_at(place, error)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn any error of the block into a BacklensError of one line: the source cannot be opened."""
        try:
            yield
        except Exception as error:  # every object store has its own errors
            raise BacklensError(f"{self.url}: cannot be opened: {one_line(str(error))}") from error

    def fail_at(self, place: str, error: Exception) -> NoReturn:
        raise BacklensError(
            f"{self.name}{place}: the file is damaged or incomplete: {one_line(str(error))}; fetch it again"
        ) from error


def one_line(text: str) -> str:
    """The text in one line, without characters that UTF-8 cannot hold."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").splitlines())


def _decompressed(stream: IO[bytes], path: str) -> Any:
    name = path.lower()
    if name.endswith(".zst"):
        # fsspec needs an extra package for zstd; pyarrow has the codec.
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"), _BUFFER_BYTES)
    if name.endswith(".zip"):
        return _only_file(zipfile.ZipFile(stream))
    if name.endswith(".bz2"):
        return io.BufferedReader(_Streams(stream, bz2.BZ2Decompressor), _BUFFER_BYTES)
    if name.endswith(".xz"):
        return io.BufferedReader(_Streams(stream, lzma.LZMADecompressor), _BUFFER_BYTES)
    compression = fsspec.utils.infer_compression(name)
    if compression is None:
        return contextlib.nullcontext(stream)
    openers: dict[Any, Any] = fsspec.compression.compr
    return openers[compression](stream, mode="r")


def _only_file(archive: zipfile.ZipFile) -> IO[bytes]:
    names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX/" not in name]
    if len(names) != 1:
        shown = ", ".join([*names[:_NAMES_SHOWN], *(["…"] if len(names) > _NAMES_SHOWN else [])])
        raise ValueError(f"it holds {len(names)} files ({shown}); unpack it and name one of them")
    return archive.open(names[0])


class _Streams(io.RawIOBase):
    """Compressed streams in sequence. Other data after the last stream is an error; the standard library ignores it."""

    def __init__(self, stream: IO[bytes], decoder: Callable[[], Any]) -> None:
        self._stream = stream
        self._new_decoder = decoder
        self._decoder = decoder()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._decoder.eof:
                more = (self._decoder.unused_data or self._stream.read(_BUFFER_BYTES)).lstrip(b"\0")
                if not more:
                    return 0
                self._decoder = self._new_decoder()
            else:
                more = self._stream.read(_BUFFER_BYTES) if self._decoder.needs_input else b""
                if self._decoder.needs_input and not more:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            data = self._decoder.decompress(more, len(buffer))
        buffer[: len(data)] = data
        return len(data)
