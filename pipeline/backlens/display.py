"""Tokens and answers as a reader sees them.

What `Atlas` answers with: an Arrow table that a notebook shows as a static HTML table.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
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


SHOWN_ROWS = 50
"""Rows that a notebook shows."""


class Answer:
    """The rows of an answer. It has what `pyarrow.Table` has, which cannot itself be derived from.

    Where a real table is asked for (`polars.from_arrow`), `answer.table` is it; what takes Arrow data by its protocol
    (`pyarrow.table`, DuckDB, `polars.DataFrame`) or rows (`pandas.DataFrame`) takes the answer itself.
    """

    def __init__(self, table: pa.Table, count: Callable[[], int] | None = None) -> None:
        """`count` says how many rows there are, if these are perhaps not all."""
        self.table = table
        self._count = count

    @cached_property
    def total(self) -> int:
        """How many rows there are without a limit; they are counted when this is first asked for."""
        rows = self.table.num_rows
        return rows if self._count is None else max(rows, self._count())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "table":
            raise AttributeError(name)
        return getattr(self.table, name)

    def to_polars(self) -> Any:
        """A polars DataFrame, where polars is installed."""
        import polars

        return polars.DataFrame(self.table)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(requested_schema)

    def __getitem__(self, key: int | str) -> pa.ChunkedArray:
        return self.table[key]

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows."""
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
    """A table without script or style sheet. Tokens are escaped, their spaces visible, each in its own direction."""
    names = shown_columns(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(map(_cell, row.values()))}</tr>"
        for row in rows.select(names).slice(0, SHOWN_ROWS).to_pylist()
    )
    total = rows.num_rows if total is None else total
    limited = f", {rows.num_rows:,} of them here (limit)" if total > rows.num_rows else ""
    shown = f"the first {SHOWN_ROWS} of " if rows.num_rows > SHOWN_ROWS else ""
    said = f"{shown}{total:,} rows{limited}"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{said}</p>"


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f'<td style="text-align: right">{cell_text(value)}</td>'
    if isinstance(value, list) and value and isinstance(value[0], str):
        # each by itself, or a token written from the right would turn the order of its neighbours round
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
"""Columns of ids, and the columns of their texts."""


def with_texts_beside(rows: pa.Table, texts: pa.Array) -> pa.Table:
    """The rows with a column of texts behind each column of token ids; `texts` are by token id."""
    for ids, tokens in ID_COLUMNS.items():
        if ids in rows.column_names:
            place = rows.column_names.index(ids) + 1
            rows = rows.add_column(place, tokens, _texts_of(rows[ids].combine_chunks(), texts))
    return rows


def _texts_of(ids: pa.Array, texts: pa.Array) -> pa.Array:
    """Texts in the shape of the ids: a column of them, or of lists of them."""
    if not pa.types.is_list(ids.type):
        return texts.take(ids)
    # A null list has no items, so that the items of the others are the array's own.
    lengths = np.diff(ids.offsets.to_numpy()) * ids.is_valid().to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = ids.is_null() if ids.null_count else None
    return pa.ListArray.from_arrays(offsets, texts.take(ids.flatten()), mask=mask)
