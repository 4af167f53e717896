"""A page before it is written, the parameters of its request, and its three forms: HTML, JSON and CSV."""

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
from backlens.heatmap import shown_rank, shown_side
from backlens.printable import json_text
from backlens.serve.questions import AnsweredQuestion, Row
from backlens.terms import WRITES


@dataclass(frozen=True, slots=True)
class Served:
    """The run that the explorer serves."""

    atlas: Atlas
    out: str
    """The run directory as the user named it."""
    modules: Sequence[str]
    """The modules that the run has rows of."""
    vocabulary: int
    """Number of tokens that lists and ranks are over."""
    has_sql: bool = False

    @classmethod
    def of(cls, atlas: Atlas, out: str, has_sql: bool = False) -> "Served":
        """The run, with the facts that do not change while it is served."""
        with atlas.question() as opened:
            named = atlas.snapshot.record.model.get("modules")
            rows = (
                []
                if named
                else opened.sql("SELECT DISTINCT module::VARCHAR FROM layers ORDER BY 1").fetchall()
            )
        return cls(atlas, out, list(named or (module for (module,) in rows)), atlas.vocabulary, has_sql)


@dataclass(frozen=True, slots=True)
class Beside:
    """The addresses of the previous and the next page."""

    previous: str | None
    next: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """A template and its content. The CSV twin has the first of the tables unless another is named."""

    template: str
    title: str
    tables: Sequence[AnsweredQuestion] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further content, which the JSON twin has too."""
    view: Mapping[str, Any] = field(default_factory=dict)
    """Content for the template alone, such as charts."""
    beside: Beside = Beside(None, None)

    def rows(self, name: str) -> Sequence[Row]:
        """The rows of a table; empty if the page does not have it."""
        return next((table.rows for table in self.tables if table.name == name), ())

    def is_cut(self, name: str) -> bool:
        """True if a table lacks some rows."""
        return any(table.is_cut for table in self.tables if table.name == name)


MOST_ROWS = 1000
LONGEST = 10_000
"""Characters that a parameter may have."""


class Missing(BacklensError):
    """The run does not have what the address names."""


@contextmanager
def is_named_by_the_address() -> Iterator[None]:
    """Turn a BacklensError into Missing: the address, not a parameter, is wrong."""
    try:
        yield
    except BacklensError as error:
        raise Missing(str(error)) from error


class Parameters:
    """The values of a query string. Unknown names raise BacklensError; an empty value counts as none."""

    def __init__(
        self, given: Iterable[tuple[str, str]], known: Sequence[str], is_for_programs: bool = False
    ) -> None:
        """`is_for_programs`: tables have all rows unless the request gives `limit`."""
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
        """The value as given."""
        return self._values.get(name)

    def number(self, name: str) -> int | None:
        """The value as a whole number from 0. Raises BacklensError if it is none."""
        value = self._values.get(name)
        return None if value is None else whole_number(name, value)

    def most(self, number: int) -> int | None:
        """The number of rows of a table that `limit` does not change; None (all) for programs."""
        return None if self._is_for_programs else number

    def limit(self, default: int) -> int | None:
        """The number of rows of each table; None for all."""
        limit = self.number("limit")
        if limit is not None and not 1 <= limit <= MOST_ROWS:
            raise BacklensError(f"limit: {limit} rows; give 1 to {MOST_ROWS:,}")
        return self.most(default) if limit is None else limit


def whole_number(name: str, text: str) -> int:
    """Parse a whole number from 0 that an int64 holds. Raises BacklensError for anything else."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise BacklensError(f"{name}: {text[:40]!r} is not a whole number from 0")
    return int(text)


def one_of(name: str, value: str | None, known: Sequence[str]) -> str | None:
    """The value. Raises BacklensError if it is none of these."""
    if value is not None and value not in known:
        raise BacklensError(
            f"{name}: {value[:40]!r} is none of {', '.join(known)}{nearest(value[:40], known)}"
        )
    return value


def as_json(page: Page, facts: dict[str, Any]) -> bytes:
    """The page as one JSON object with its tables by name."""
    tables = {table.name: [dict(row) for row in table.rows] for table in page.tables}
    document = {"title": page.title, **facts, **page.facts, "tables": tables}
    return json_text(document).encode("utf-8", "backslashreplace")


def as_csv(page: Page, name: str | None) -> bytes:
    """The named table of a page, or its first, as CSV; lists are JSON."""
    table = _table(page, name)
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(table.columns)
    for row in table.rows:
        writer.writerow([_in_one_cell(row[column]) for column in table.columns])
    return written.getvalue().encode("utf-8", "backslashreplace")


def _table(page: Page, name: str | None) -> AnsweredQuestion:
    tables = {table.name: table for table in page.tables}
    if not tables:
        raise BacklensError("this page has no tables; its JSON twin has its content")
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
"""Characters of a token or cell that a page shows; JSON and CSV have all."""
SIGNS = frozenset("␣⏎␍⇥")
"""Signs for spaces and line breaks."""


def number(value: Any) -> str:
    """A number with four significant digits, a whole number with separators, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if math.isfinite(value) and (value == 0 or 1e-4 <= abs(value) < 1e6):
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return f"{value:.3g}"
    return f"{value:,}"


def token(text: str | None) -> Markup:
    """A token on one line, with signs for spaces and line breaks and codes for unprintable characters."""
    if text is None:
        return Markup("–")
    shown = visible(text)
    if len(shown) > LONGEST_TOKEN:
        shown = f"{shown[:LONGEST_TOKEN]}…"
    if shown.isprintable() and SIGNS.isdisjoint(shown):  # the fast path of nearly all tokens
        return Markup.escape(shown) or Markup('<span class="sign">∅</span>')
    return Markup("").join(map(_letter, shown))


def _letter(letter: str) -> Markup:
    if letter in SIGNS:
        return Markup('<span class="sign">{}</span>').format(letter)
    if not letter.isprintable():
        return Markup('<span class="sign">⟨{:x}⟩</span>').format(ord(letter))
    return Markup.escape(letter)


def cell(value: Any) -> str:
    """Any value of a table, cut to the room of a cell."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = visible(str(value))
        return shown if len(shown) <= LONGEST_TOKEN else f"{shown[:LONGEST_TOKEN]}…"
    return number(value)


def _promoted_rank(rank: int | None, vocabulary: int) -> int | None:
    """The raw rank of a neuron's list, counted from the promoted end."""
    return None if rank is None else vocabulary - 1 - rank


@cache
def environment() -> Environment:
    """The templates, which escape every value."""
    made = Environment(
        loader=PackageLoader("backlens.serve"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "token": token, "cell": cell, "promoted_rank": _promoted_rank}
    made.globals |= {"assets": assets_version(), "version": __version__, "writes": WRITES}
    made.globals |= {"shown_rank": shown_rank, "shown_side": shown_side}
    return made


@cache
def assets_version() -> str:
    """A digest of the style sheet and the script, so that browsers do not keep old ones."""
    names = ("style.css", "explorer.js")
    return sha256(b"".join(asset(name).encode() for name in names)).hexdigest()[:8]


def asset(name: str) -> str:
    """The text of a file of `static/`."""
    return (files("backlens.serve") / "static" / name).read_text("utf-8")


def as_html(page: Page, served: Served, **around: Any) -> str:
    """The page as an HTML document."""
    return (
        environment()
        .get_template(page.template)
        .render(
            page=page,
            served=served,
            note=served.atlas.note,
            cut_off=str(served.atlas.cut_off),
            linked=True,
            vocabulary=served.vocabulary,
            **page.facts,
            **page.view,
            **around,
        )
    )
