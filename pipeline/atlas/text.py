"""Tokens and answers as a reader sees them."""

from typing import Any

import pyarrow as pa

SHOWN_IN_LISTS = 5
"""List items that a table's cell shows; JSON and CSV have them all."""


def visible(text: str) -> str:
    """Text on one line, with the spaces at its ends and its line breaks to be seen."""
    text = text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    stripped = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    return "␣" * lead + stripped + "␣" * (len(text) - lead - len(stripped)) if stripped else "␣" * len(text)


def shown_columns(answer: pa.Table) -> list[str]:
    """The columns that a reader looks for.

    One of nulls alone (the experts of a dense model) says nothing; where a list of tokens has its texts, their ids and
    scores are left to programs.
    """
    columns = answer.column_names
    sides = [name.removesuffix("_tokens") for name in columns if name.endswith("_tokens")]
    beside = {side + suffix for side in sides for suffix in ("_ids", "_scores")}
    return [
        name for name in columns if answer[name].null_count < max(answer.num_rows, 1) and name not in beside
    ]


def cell_text(value: Any) -> str:
    """A value of an answer as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        more = " …" if len(value) > SHOWN_IN_LISTS else ""
        return " ".join(cell_text(item) for item in value[:SHOWN_IN_LISTS]) + more
    return str(value)
