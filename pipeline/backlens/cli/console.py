"""The output of all commands: text, tables, JSON and errors, on standard output and standard error.

Texts from data never control a terminal, and letters that a stream's encoding lacks are escaped. Nothing else in the
command line calls `print` or makes a `Console`. Standard error has text for people, or one JSON object per line for
programs. An error in the command line becomes one line that proposes the nearest known word.
"""

import codecs
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, get_args, get_origin

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    Parameter,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from backlens.engine.events import LOGGER, emit
from backlens.errors import BacklensError, nearest
from backlens.printable import is_text, json_text, printable

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

Debug = Annotated[bool, Parameter(negative=(), help="Show the traceback of an error.")]

WIDE = 400
"""Columns of a table that is not printed to a terminal: a narrow default would fold every cell."""


class _SafeConsole(Console):
    """A console that escapes control characters in texts, and keeps its own colours and cursor movements."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before widths are measured


def console(*, stderr: bool = False, wide: int = WIDE) -> Console:
    """Make a console that reads no markup, emoji or numbers in texts; `wide` is its width without a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else wide
    return _SafeConsole(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bar(*columns: "ProgressColumn") -> Iterator["Progress | None"]:
    """Show a bar with these columns on standard error; give None if that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    first = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*first, *columns, console=console(stderr=True)) as bar:
        yield bar


def require_folder(path: str, option: str) -> None:
    """Raise BacklensError if the folder of a file to write does not exist."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise BacklensError(f"{option} {path}: there is no folder {Path(path).parent}; make it first")


def say(text: object = "", *, stderr: bool = False, end: str = "\n") -> None:
    """Print one text for people, without buffering."""
    stream = sys.stderr if stderr else sys.stdout
    _write(stream, printable(str(text)) + end)


def say_json(value: Any, indent: int | None = None) -> None:
    """Print one JSON document."""
    _write(sys.stdout, json_for(sys.stdout, value, indent) + "\n")


def json_for(stream: TextIO, value: Any, indent: int | None = None) -> str:
    """Write `value` as JSON: in UTF-8, or in ASCII if the stream has another encoding."""
    text = json_text(value, indent)
    return text if _is_utf8(stream) and is_text(text) else json_text(value, indent, ascii_only=True)


def escape_what_cannot_be_shown() -> None:
    """Print letters that a standard stream cannot encode as `\\u03b4`, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_utf8(stream: TextIO) -> bool:
    return codecs.lookup(stream.encoding or "utf-8").name == "utf-8"


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """Writes time (ISO 8601, UTC), level, event and its fields; for records of other libraries, their message."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": time, "level": record.levelname.lower()}
        if record.name == LOGGER.name:
            line |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        else:
            line |= {"event": "log", "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json_for(sys.stderr, line)


class NoteHandler(logging.Handler):
    """Prints the text of `note` events, one per line; a run's progress shows the other events."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "note":
            say(getattr(record, "fields", {}).get("text", ""), stderr=True)


def log_format(tokens: Sequence[str]) -> LogFormat:
    """Find --log-format before the command line is parsed, so that its errors have the same format."""
    given = " ".join(tokens).replace("--log-format=", "--log-format ")
    return "json" if "--log-format json" in given else "text"


@contextmanager
def logging_as(format: LogFormat) -> Iterator[None]:
    """Log as JSON every record, those of other libraries too, and Python's warnings; log as text only notes."""
    if format == "text":
        notes = NoteHandler()
        LOGGER.addHandler(notes)
        try:
            yield
        finally:
            LOGGER.removeHandler(notes)
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)


def say_error(message: str, format: LogFormat) -> None:
    if format == "json":
        emit("error", level=logging.ERROR, message=message)
    else:
        say(f"backlens: {message}", stderr=True)


def say_interrupted(format: LogFormat) -> None:
    say_error("interrupted; the same command goes on from what is committed", format)


PROPOSAL = re.compile(r' Did you mean "[^"]*"\?')


def explained(error: CycloptsError) -> str:
    """Say what is wrong, which word was probably meant, and where to read more."""
    said = _text_of(error)
    return f"{said}{'' if said.endswith(('.', '?')) else '.'} See `backlens --help`."


def _text_of(error: CycloptsError) -> str:
    """Return cyclopts' text, with our proposal for an unknown word: for --modle cyclopts proposes --modules."""
    said = " ".join(str(error).split())
    if isinstance(error, UnknownOptionError):
        word = (error.token.keyword or error.token.value).partition("=")[0]
        known = [name for argument in error.argument_collection if argument.parse for name in argument.names]
        return f"unknown option {word}{nearest(word, known)}"
    if isinstance(error, UnknownCommandError | UnusedCliTokensError) and error.unused_tokens:
        word, known = error.unused_tokens[0], _commands(error.app)
        if isinstance(error, UnusedCliTokensError):
            return f'unexpected word "{word}"{nearest(word, known)}'
        return f'unknown command "{word}"{nearest(word, known) or "; there are " + ", ".join(known)}'
    if isinstance(error, CoercionError) and error.token and get_origin(error.target_type) is Literal:
        known = [each for each in get_args(error.target_type) if isinstance(each, str)]
        return PROPOSAL.sub("", said).removesuffix(".") + nearest(error.token.value, known)
    return said


def _commands(app: App | None) -> list[str]:
    return [] if app is None else [name for name in app if not name.startswith("-")]
