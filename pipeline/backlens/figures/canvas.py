"""What all figures share: fonts for any script, tokens that fit, and files by their suffix."""

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
"""Columns that a token may take in a cell; letters of Chinese or Japanese take two."""

FALLBACKS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans", "WenQuanYi Micro Hei", "PingFang SC"),
    *("Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai"),
    *("Noto Sans Arabic", "Noto Sans Hebrew", "Segoe UI", "Arial Unicode MS"),
)
"""Fonts for scripts that DejaVu Sans, which matplotlib brings, has no letters for; used where installed."""


def require_matplotlib() -> None:
    """Refuses in one line if the extra is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise BacklensError(
            'plot: matplotlib is not installed; install the extra: pip install "backlens[plot]"'
        ) from error
    matplotlib.use("Agg")
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *_installed_fallbacks()]
    # Text stays text in SVG: it can be searched, and the viewer's own fonts draw what ours have not.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "backlens"


def check_target(path: str) -> Path:
    """Refuses a file whose suffix names no format, before anything is computed."""
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise BacklensError(f"--to {path}: the suffix says the format; use one of {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise BacklensError(f"--to {path}: there is no folder {target.parent}; make it first")
    return target


def save(figure: "Figure", target: Path) -> None:
    """Writes the figure, whole or not at all; the same figure gives the same SVG."""
    suffix = target.suffix.lower()
    metadata = {"Date": None} if suffix == ".svg" else None
    try:
        with replacing(target) as temporary, warnings.catch_warnings():
            # What no font has was replaced by its code where the file could not show it (`shown`).
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
            figure.savefig(temporary, dpi=DPI, metadata=metadata, format=suffix[1:])
    except OSError as error:
        raise BacklensError(f"--to {target}: cannot be written ({error.strerror or error})") from error


def shown(token: str | None, is_vector: bool, longest: int = LONGEST) -> str:
    """A token on one line, spaces and line breaks visible, cut to what a cell has room for.

    Letters that none of our fonts has are given by their code, as in `<4e2d>`, unless the file is a vector
    image, whose viewer brings fonts of its own.
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
    """What a reader of a figure that says this should know: that some of its letters stand as codes."""
    missing = {letter for text in said for letter in visible(text or "") if letter.isprintable()}
    missing = set() if is_vector else {letter for letter in missing if ord(letter) not in _covered()}
    if not missing:
        return None
    return (
        f"{len(missing)} letters (such as {_drawable(min(missing), is_vector)}) are in no font installed here and "
        "stand as their codes; install one that has them (Noto Sans CJK, for example), or draw an .svg"
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
