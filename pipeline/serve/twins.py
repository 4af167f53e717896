"""A page's tables as JSON, all of them, and as CSV, one of them."""

import csv
import io
from typing import Any

from pipeline.errors import BacklensError, nearest
from pipeline.plain import json_text
from pipeline.serve.asked import Asked
from pipeline.serve.page import Page


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


def _table(page: Page, name: str | None) -> Asked:
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
