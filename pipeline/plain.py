"""Values and texts in a form that JSON, and a terminal, can hold."""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

IN_NO_JSON_LINE = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Letters that JSON allows as they are, but that control terminals, turn text round or end a line for some readers."""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Letters that control a terminal (all but tab and line break), or turn the order of what follows round."""


def plain(value: Any) -> Any:
    """The value in numbers, text, lists and objects; NaN and infinities, for which JSON has no word, are null."""
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
    """`value` as JSON for every reader: never `NaN` or `Infinity`, and no letter that controls a terminal."""
    text = json.dumps(plain(value), ensure_ascii=ascii_only, allow_nan=False, indent=indent)
    return IN_NO_JSON_LINE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def is_text(text: str) -> bool:
    """Tell whether UTF-8 can hold the text: a file name that is not text has letters that it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    r"""The text with its control characters as `\x1b`: what comes from data never controls a terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
