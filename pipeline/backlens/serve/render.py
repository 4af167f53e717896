"""Numbers and tokens as pages show them.

Pages as HTML: the templates, and what all of them know.
"""

import math
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from backlens import __version__
from backlens.display import visible
from backlens.serve import render as text
from backlens.serve.page import Page, Served

LONGEST = 160
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
    if len(shown) > LONGEST:
        shown = f"{shown[:LONGEST]}…"
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
        return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"
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
