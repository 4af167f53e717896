"""What `Atlas` answers with: an Arrow table that a notebook shows as a static HTML table."""

from html import escape
from typing import Any

import pyarrow as pa

from pipeline.atlas.text import cell_text, shown_columns

SHOWN_ROWS = 50
"""Rows that a notebook shows."""


class Answer:
    """The rows of an answer. It has what `pyarrow.Table` has, which cannot itself be derived from.

    Where a real table is asked for, `answer.table` is it; what takes Arrow data by its protocol (`pyarrow.table`,
    DuckDB, Polars, pandas 3) takes the answer itself.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "table":
            raise AttributeError(name)
        return getattr(self.table, name)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(requested_schema)

    def __getitem__(self, key: int | str) -> pa.ChunkedArray:
        return self.table[key]

    def __len__(self) -> int:
        return self.table.num_rows

    def __eq__(self, other: object) -> bool:
        return self.table.equals(other.table if isinstance(other, Answer) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return table_html(self.table)


def table_html(rows: pa.Table) -> str:
    """A table without script or style sheet. Tokens are escaped, their spaces visible, each in its own direction."""
    names = shown_columns(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(map(_cell, row.values()))}</tr>"
        for row in rows.select(names).slice(0, SHOWN_ROWS).to_pylist()
    )
    shown = f"the first {SHOWN_ROWS} of " if rows.num_rows > SHOWN_ROWS else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{shown}{rows.num_rows:,} rows</p>"


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f'<td style="text-align: right">{cell_text(value)}</td>'
    if isinstance(value, list) and value and isinstance(value[0], str):
        # each by itself, or a token written from the right would turn the order of its neighbours round
        return f'<td style="text-align: left">{" ".join(map(_isolated, value))}</td>'
    return f'<td style="text-align: left">{_isolated(value)}</td>'


def _isolated(value: Any) -> str:
    return f"<bdi>{escape(cell_text(value))}</bdi>"
