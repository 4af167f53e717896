"""Values and texts for JSON and for a terminal, and sizes and times for people."""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

IN_NO_JSON_LINE = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Letters that JSON allows as they are, but that control terminals, turn text round or end a line for some readers."""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Letters that control a terminal (except tab and line break) or reverse the order of the text after them."""


def plain(value: Any) -> Any:
    """Return the value as numbers, text, lists and objects; NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return int(value)
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def json_text(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """Write `value` as JSON for every reader: no `NaN`, no `Infinity`, and no letter that controls a terminal."""
    text = json.dumps(plain(value), ensure_ascii=ascii_only, allow_nan=False, indent=indent)
    return IN_NO_JSON_LINE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def is_text(text: str) -> bool:
    """Tell whether UTF-8 can hold the text; a file name that is not text has letters that it cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    r"""Return the text with its control characters written as `\x1b`: data never controls a terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


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
