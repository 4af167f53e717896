"""What a page is before it is written as HTML, JSON or CSV.

What a request asks for: the values of its query string, checked; and what is answered when it is not there.

A page's tables as JSON, all of them, and as CSV, one of them.

Numbers and tokens as pages show them.

Pages as HTML: the templates, and what all of them know.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from backlens import __version__
from backlens.atlas import Atlas
from backlens.display import visible
from backlens.errors import BacklensError, nearest
from backlens.printable import json_text
from backlens.serve import page as text
from backlens.serve.questions import AnsweredQuestion, Row


@dataclass(frozen=True, slots=True)
class Served:
    """What is served."""

    atlas: Atlas
    out: str
    """The run directory as its user names it."""
    modules: Sequence[str]
    """Those that the run has rows of."""
    vocabulary: int
    """How many tokens there are."""
    has_sql: bool = False

    @classmethod
    def of(cls, atlas: Atlas, out: str, has_sql: bool = False) -> "Served":
        """The run, with what does not change while it is served."""
        with atlas.question() as opened:
            ((vocabulary,),) = opened.sql("SELECT count(*) FROM vocab").fetchall()
            named = atlas.snapshot.record.model.get("modules")
            rows = (
                []
                if named
                else opened.sql("SELECT DISTINCT module::VARCHAR FROM layers ORDER BY 1").fetchall()
            )
        return cls(atlas, out, list(named or (module for (module,) in rows)), vocabulary, has_sql)


@dataclass(frozen=True, slots=True)
class Beside:
    """The pages before and after this one."""

    previous: str | None
    next: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """A page's template and what fills it; `asked` are its tables, of which the first is the CSV twin's."""

    template: str
    title: str
    asked: Sequence[AnsweredQuestion] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the page says, in its JSON twin too."""
    view: Mapping[str, Any] = field(default_factory=dict)
    """What the template draws from the tables."""
    beside: Beside = Beside(None, None)

    def rows(self, name: str) -> Sequence[Row]:
        """The rows of one of its tables; none if it was not asked for."""
        return next((asked.rows for asked in self.asked if asked.name == name), ())

    def is_cut(self, name: str) -> bool:
        """Whether one of its tables has not all rows."""
        return any(asked.is_cut for asked in self.asked if asked.name == name)


MOST_ROWS = 1000
LONGEST = 10_000
"""Characters of one value."""


class Missing(BacklensError):
    """What the address names is not in this run."""


@contextmanager
def is_named_by_the_address() -> Iterator[None]:
    """What is refused in here is not found, rather than badly asked for."""
    try:
        yield
    except BacklensError as error:
        raise Missing(str(error)) from error


class Parameters:
    """A query string's values; a name that the page does not know is refused, an empty value is none."""

    def __init__(
        self, given: Iterable[tuple[str, str]], known: Sequence[str], is_for_programs: bool = False
    ) -> None:
        """A page `is_for_programs` has every row, but where the request says `limit`."""
        self._is_for_programs = is_for_programs
        self._values: dict[str, str] = {}
        for name, value in given:
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise BacklensError(
                    f"this page has no parameter {name[:40]!r}; {takes}{nearest(name[:40], known)}"
                )
            if len(value) > LONGEST:
                raise BacklensError(f"{name}: {len(value):,} characters are too many; at most {LONGEST:,}")
            if value:
                self._values[name] = value

    def text(self, name: str) -> str | None:
        """The value as it was given."""
        return self._values.get(name)

    def number(self, name: str) -> int | None:
        """The value as a whole number from 0."""
        value = self._values.get(name)
        return None if value is None else whole_number(name, value)

    def most(self, number: int) -> int | None:
        """How many rows a table has whatever the request says: so many for people, all for programs."""
        return None if self._is_for_programs else number

    def limit(self, default: int) -> int | None:
        """How many rows each table may have; None for all."""
        limit = self.number("limit")
        if limit is not None and not 1 <= limit <= MOST_ROWS:
            raise BacklensError(f"limit: {limit} rows; give 1 to {MOST_ROWS:,}")
        return self.most(default) if limit is None else limit


def whole_number(name: str, text: str) -> int:
    """A whole number from 0 that an int64 holds."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise BacklensError(f"{name}: {text[:40]!r} is not a whole number from 0")
    return int(text)


def one_of(name: str, value: str | None, known: Sequence[str]) -> str | None:
    """The value, which must be one of these if there is one."""
    if value is not None and value not in known:
        raise BacklensError(
            f"{name}: {value[:40]!r} is none of {', '.join(known)}{nearest(value[:40], known)}"
        )
    return value


def as_json(page: Page, facts: dict[str, Any]) -> bytes:
    """One object: what the page is, and its tables by name, a list of rows each."""
    tables = {asked.name: [dict(row) for row in asked.rows] for asked in page.asked}
    document = {"title": page.title, **facts, **page.facts, "tables": tables}
    return json_text(document).encode("utf-8", "backslashreplace")


def as_csv(page: Page, name: str | None) -> bytes:
    """The table of that name, or the page's first; lists are JSON."""
    asked = _table(page, name)
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(asked.columns)
    for row in asked.rows:
        writer.writerow([_in_one_cell(row[column]) for column in asked.columns])
    return written.getvalue().encode("utf-8", "backslashreplace")


def _table(page: Page, name: str | None) -> AnsweredQuestion:
    tables = {asked.name: asked for asked in page.asked}
    if not tables:
        raise BacklensError("this page has no tables; its JSON twin has what it says")
    name = name or next(iter(tables))
    if name not in tables:
        raise BacklensError(
            f"table: this page has no table {name[:40]!r}; it has {', '.join(tables)}"
            f"{nearest(name[:40], list(tables))}"
        )
    return tables[name]


def _in_one_cell(value: Any) -> Any:
    return json_text(value) if isinstance(value, list | tuple | dict) else value


LONGEST_TOKEN = 160
"""Letters of a token or cell that a page shows; JSON and CSV have them all."""
SIGNS = frozenset("␣⏎␍⇥")
"""What stands for spaces and line breaks."""


def number(value: Any) -> str:
    """Four significant digits; whole numbers with separators; a dash for what is not there."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if math.isfinite(value) and (value == 0 or 1e-4 <= abs(value) < 1e6):
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return f"{value:.3g}"
    return f"{value:,}"


def token(text: str | None) -> Markup:
    """A token on one line: spaces and line breaks are signs, what can't be printed is its code."""
    if text is None:
        return Markup("–")
    shown = visible(text)
    if len(shown) > LONGEST_TOKEN:
        shown = f"{shown[:LONGEST_TOKEN]}…"
    if shown.isprintable() and SIGNS.isdisjoint(shown):  # nearly all, and a heatmap has thousands
        return Markup.escape(shown) or Markup('<span class="sign">∅</span>')
    return Markup("").join(map(_letter, shown))


def _letter(letter: str) -> Markup:
    if letter in SIGNS:
        return Markup('<span class="sign">{}</span>').format(letter)
    if not letter.isprintable():
        return Markup('<span class="sign">⟨{:x}⟩</span>').format(ord(letter))
    return Markup.escape(letter)


def cell(value: Any) -> str:
    """Any value of a table, cut to what a cell has room for."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = visible(str(value))
        return shown if len(shown) <= LONGEST_TOKEN else f"{shown[:LONGEST_TOKEN]}…"
    return number(value)


@cache
def environment() -> Environment:
    """The templates; whatever they are given is escaped."""
    made = Environment(
        loader=PackageLoader("backlens.serve"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": text.number, "token": text.token, "cell": text.cell}
    made.globals |= {"assets": assets_version(), "version": __version__}
    return made


@cache
def assets_version() -> str:
    """Changes with the style sheet or the script, so that no browser keeps an old one."""
    names = ("style.css", "explorer.js")
    return sha256(b"".join(asset(name).encode() for name in names)).hexdigest()[:8]


def asset(name: str) -> str:
    """A file of `static/`."""
    return (files("backlens.serve") / "static" / name).read_text("utf-8")


def as_html(page: Page, served: Served, **around: Any) -> str:
    """The page as a document of its own."""
    return (
        environment()
        .get_template(page.template)
        .render(
            page=page,
            served=served,
            note=served.atlas.note,
            cut_off=str(served.atlas.cut_off),
            linked=True,
            **page.facts,
            **page.view,
            **around,
        )
    )
