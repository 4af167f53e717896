"""How every command prints. What comes from data controls no terminal, and what a terminal cannot show is escaped.

Nothing else in the command line calls `print` or makes a `Console`; ruff (T201) and tests/test_layout.py hold that.
"""

import codecs
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pipeline.plain import is_text, json_text, printable

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
