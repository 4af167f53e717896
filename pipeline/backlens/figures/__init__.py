"""Figures with matplotlib (the extra `plot`).

This file holds what all of them share: fonts for any script, token texts that fit into a cell, and files by suffix.
"""

import logging
import unicodedata
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from backlens.display import visible
from backlens.errors import BacklensError
from backlens.store.directory import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
DPI = 150
LONGEST = 12
"""Columns that a token may take in a cell; a letter of Chinese or Japanese takes two."""

FALLBACKS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans", "WenQuanYi Micro Hei", "PingFang SC"),
    *("Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai"),
    *("Noto Sans Arabic", "Noto Sans Hebrew", "Segoe UI", "Arial Unicode MS"),
)
"""Fonts for scripts that DejaVu Sans (matplotlib's own) does not cover; used where they are installed."""


def require_matplotlib() -> None:
    """Raise BacklensError if matplotlib is not installed; else set its fonts and its drawing without a screen."""
    try:
        import matplotlib
    except ImportError as error:
        raise BacklensError(
            'plot: matplotlib is not installed; install the extra: pip install "backlens[plot]"'
        ) from error
    matplotlib.use("Agg")
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *_installed_fallbacks()]
    # Text stays text in SVG: readers can search it, and the viewer's own fonts draw what ours lack.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "backlens"


def check_target(path: str) -> Path:
    """The path of an image file. Raises BacklensError for an unknown suffix or a missing folder, before any work."""
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise BacklensError(f"--to {path}: the suffix says the format; use one of {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise BacklensError(f"--to {path}: there is no folder {target.parent}; make it first")
    return target


def save(figure: "Figure", target: Path) -> None:
    """Write the figure atomically; the same figure gives the same SVG."""
    suffix = target.suffix.lower()
    metadata = {"Date": None} if suffix == ".svg" else None
    try:
        with replacing(target) as temporary, warnings.catch_warnings():
            # `shown` has replaced letters without a font by their codes where the file cannot show them.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
            figure.savefig(temporary, dpi=DPI, metadata=metadata, format=suffix[1:])
    except OSError as error:
        raise BacklensError(f"--to {target}: cannot be written ({error.strerror or error})") from error


def shown(token: str | None, is_vector: bool, longest: int = LONGEST) -> str:
    """A token on one line, with visible spaces and line breaks, cut to `longest` columns.

    Letters without an installed font stand as their code (`<4e2d>`), but not in a vector image: its viewer has fonts of
    its own.
    """
    if token is None:
        return ""
    letters = [_drawable(letter, is_vector) for letter in visible(token)]
    widths = [_columns(letter) for letter in letters]
    if sum(widths) <= longest:
        return "".join(letters)
    kept, room = "", longest - 1
    for letter, width in zip(letters, widths, strict=True):
        if width > room:
            break
        kept, room = kept + letter, room - width
    return f"{kept}…"


def missing_letters(said: Iterable[str | None], is_vector: bool) -> str | None:
    """A warning that some letters of these texts stand as codes; None if all have a font."""
    missing = {letter for text in said for letter in visible(text or "") if letter.isprintable()}
    missing = set() if is_vector else {letter for letter in missing if ord(letter) not in _covered()}
    if not missing:
        return None
    return (
        f"{len(missing)} letters (such as {_drawable(min(missing), is_vector)}) are in no font installed here and "
        "stand as their codes; install a font that has them (such as Noto Sans CJK), or draw an .svg"
    )


def _drawable(letter: str, is_vector: bool) -> str:
    if not letter.isprintable():
        return f"<{ord(letter):x}>"
    if is_vector or ord(letter) in _covered():
        return letter
    return f"<{ord(letter):x}>"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


@cache
def _installed_fallbacks() -> tuple[str, ...]:
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return tuple(name for name in FALLBACKS if name in installed)


@cache
def _covered() -> frozenset[int]:
    """The code points that our fonts have letters for."""
    from matplotlib.font_manager import findfont, get_font

    fonts = [get_font(findfont(name)) for name in ("DejaVu Sans", *_installed_fallbacks())]
    return frozenset(code for font in fonts for code in font.get_charmap())
