"""Tokens and tables as people see them: visible spaces, texts beside ids, and static HTML for notebooks.

`Answer` is the Arrow table that questions return.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from html import escape
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa

SHOWN_IN_LISTS = 5
"""List items that a cell shows; JSON and CSV have all of them."""


def visible(text: str) -> str:
    """The text on one line, with signs for line breaks and for spaces at its ends."""
    text = text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    stripped = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    return "␣" * lead + stripped + "␣" * (len(text) - lead - len(stripped)) if stripped else "␣" * len(text)


def shown_columns(answer: pa.Table) -> list[str]:
    """The columns that people need.

    Left out are columns of nulls (the experts of a dense model), and the ids and scores of lists that have texts.
    """
    columns = answer.column_names
    sides = [name.removesuffix("_tokens") for name in columns if name.endswith("_tokens")]
    beside = {side + suffix for side in sides for suffix in ("_ids", "_scores")}
    return [
        name for name in columns if answer[name].null_count < max(answer.num_rows, 1) and name not in beside
    ]


def cell_text(value: Any) -> str:
    """A value as a cell shows it."""
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


SHOWN_ROWS = 50
"""Rows that a notebook shows."""


class Answer:
    """The rows of an answer, with the methods of `pyarrow.Table` (a class that cannot be subclassed).

    Functions that take Arrow data by its protocol (`pyarrow.table`, DuckDB, `polars.DataFrame`) or rows
    (`pandas.DataFrame`) take the answer itself; for those that need a real table (`polars.from_arrow`) there is
    `answer.table`.
    """

    def __init__(self, table: pa.Table, count: Callable[[], int] | None = None) -> None:
        """`count` returns the number of all rows, if the table may lack some."""
        self.table = table
        self._count = count

    @cached_property
    def total(self) -> int:
        """The number of rows without a limit, counted on first use."""
        rows = self.table.num_rows
        return rows if self._count is None else max(rows, self._count())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "table":
            raise AttributeError(name)
        return getattr(self.table, name)

    def to_polars(self) -> Any:
        """A polars DataFrame. Raises ImportError if polars, which backlens does not need, is not installed."""
        return import_module("polars").DataFrame(self.table)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(requested_schema)

    def __getitem__(self, key: int | str) -> pa.ChunkedArray:
        return self.table[key]

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows."""
        for batch in self.table.to_batches():
            yield from batch.to_pylist()

    def __eq__(self, other: object) -> bool:
        return self.table.equals(other.table if isinstance(other, Answer) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return table_html(self.table, self.total)


def table_html(rows: pa.Table, total: int | None = None) -> str:
    """A static table without script or style sheet; tokens are escaped and keep their own writing direction."""
    names = shown_columns(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(map(_cell, row.values()))}</tr>"
        for row in rows.select(names).slice(0, SHOWN_ROWS).to_pylist()
    )
    total = rows.num_rows if total is None else total
    limited = f" ({rows.num_rows:,} of them here: limit)" if total > rows.num_rows else ""
    shown = f"the first {SHOWN_ROWS} of " if rows.num_rows > SHOWN_ROWS else ""
    said = f"{shown}{total:,} rows{limited}"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{said}</p>"


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f'<td style="text-align: right">{cell_text(value)}</td>'
    if isinstance(value, list) and value and isinstance(value[0], str):
        # Each token alone: a right-to-left token would otherwise reverse the order of its neighbours.
        return f'<td style="text-align: left">{" ".join(map(_isolated, value))}</td>'
    return f'<td style="text-align: left">{_isolated(value)}</td>'


def _isolated(value: Any) -> str:
    return f"<bdi>{escape(cell_text(value))}</bdi>"


ID_COLUMNS = {
    "token_id": "token",
    "token_ids": "tokens",
    "target_ids": "target_tokens",
    "predicted_id": "predicted_token",
    "top_ids": "top_tokens",
    "bottom_ids": "bottom_tokens",
}
"""Columns of token ids, and the columns of their texts."""


def with_texts_beside(rows: pa.Table, texts: pa.Array) -> pa.Table:
    """The rows with a column of texts after each column of token ids. `texts` has the text of each token id."""
    for ids, tokens in ID_COLUMNS.items():
        if ids in rows.column_names:
            place = rows.column_names.index(ids) + 1
            rows = rows.add_column(place, tokens, _texts_of(rows[ids].combine_chunks(), texts))
    return rows


def _texts_of(ids: pa.Array, texts: pa.Array) -> pa.Array:
    """The texts of a column of ids or of lists of ids."""
    if not pa.types.is_list(ids.type):
        return texts.take(ids)
    # `flatten` skips null lists, so their lengths count as 0.
    lengths = np.diff(ids.offsets.to_numpy()) * ids.is_valid().to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = ids.is_null() if ids.null_count else None
    return pa.ListArray.from_arrays(offsets, texts.take(ids.flatten()), mask=mask)
