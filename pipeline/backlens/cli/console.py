"""How every command prints. What comes from data controls no terminal, and what a terminal cannot show is escaped.

Nothing else in the command line calls `print` or makes a `Console`; ruff (T201) and tests/test_layout.py hold that.

Durations in words.

Sizes as a reader takes them in.

What a command says on standard error: text for people, or one JSON object a line for programs.

A mistyped command line, as one line that names the word which was meant.
"""

import codecs
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from typing import Any, Literal, TextIO, get_args, get_origin

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from backlens.engine.events import LOGGER, emit
from backlens.errors import nearest
from backlens.printable import is_text, json_text, printable

WIDE = 400
"""Columns off a terminal, where there is no width to fit into: a narrow default folds every cell."""


class _SafeConsole(Console):
    """Escapes control characters in what it is given; its own colours and cursor movements are its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before widths are measured


def console(*, stderr: bool = False, wide: int | None = None) -> Console:
    """A console for texts that come from data: nothing in them is read as markup, emoji or numbers.

    `wide` is its width off a terminal.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if wide is None or stream.isatty() else wide
    return _SafeConsole(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def say(text: object = "", *, stderr: bool = False, end: str = "\n") -> None:
    """Print one text for people, at once."""
    stream = sys.stderr if stderr else sys.stdout
    _write(stream, printable(str(text)) + end)


def say_json(value: Any, indent: int | None = None) -> None:
    """Print one JSON document."""
    _write(sys.stdout, json_for(sys.stdout, value, indent) + "\n")


def json_for(stream: TextIO, value: Any, indent: int | None = None) -> str:
    """`value` as JSON: in UTF-8, or in ASCII alone where the stream has another encoding."""
    text = json_text(value, indent)
    return text if _is_utf8(stream) and is_text(text) else json_text(value, indent, ascii_only=True)


def escape_what_cannot_be_shown() -> None:
    """Letters that the encoding of a standard stream does not have are printed as `\\u03b4`, and end no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_utf8(stream: TextIO) -> bool:
    return codecs.lookup(stream.encoding or "utf-8").name == "utf-8"


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


def duration(seconds: float) -> str:
    """Rounded to seconds, or from an hour on to minutes: `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def human_bytes(size: float) -> str:
    """1536 → 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def human_seconds(seconds: float) -> str:
    """5400 → 1.5 h."""
    for unit, size in (("days", 48 * 3600.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'days' else size):,.1f} {unit}"
    return f"{seconds:,.1f} s"


LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """time (ISO 8601, UTC), level, event, then the event's fields; of other libraries' records, their message."""

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
    """The text of `note` events, a line each; whoever shows a run's progress tells the other events."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "note":
            say(getattr(record, "fields", {}).get("text", ""), stderr=True)


def log_format(tokens: Sequence[str]) -> LogFormat:
    """What a command line asks for, before it is parsed: its mistakes are told in the same format."""
    given = " ".join(tokens).replace("--log-format=", "--log-format ")
    return "json" if "--log-format json" in given else "text"


@contextmanager
def logging_as(format: LogFormat) -> Iterator[None]:
    """Write every record, of other libraries too, and Python's warnings; in text, only what is waited for."""
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
    """What is wrong, what may have been meant, and where to read more."""
    said = _said(error)
    return f"{said}{'' if said.endswith(('.', '?')) else '.'} See `backlens --help`."


def _said(error: CycloptsError) -> str:
    """cyclopts' own words, but of an unknown word ours: it finds --modules where --modle should be --model."""
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
