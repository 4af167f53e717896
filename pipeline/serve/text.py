"""Numbers and tokens as pages show them."""

import math
from typing import Any

from markupsafe import Markup

from pipeline.atlas.text import visible

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
