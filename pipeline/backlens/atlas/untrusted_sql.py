"""A bound on this process's memory while it runs a query that anyone may have written.

DuckDB's own limit does not count everything (`len(range(600000000))` takes 5 GB whatever it is), so the operating
system is asked to refuse more: DuckDB then says that memory is short, as it does at its own limit.

SQL over a run's tables, for people who are not trusted with more than reading them.

What a stranger writes gets a database (`database.py`) of its own, which reaches the run's files only. It must
moreover be one SELECT that only reads, and DuckDB's word for it is not enough: it counts
`WITH w AS (COPY … TO …) SELECT …` as a SELECT, and the table function `json_execute_serialized_sql` runs such a
statement from a string; either may overwrite the files that the views read. So the statement's own syntax tree must
hold nothing but queries, and no table functions but those known to be harmless.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from duckdb.sqltypes import DuckDBPyType

from backlens.atlas.tables import ATLAS_TABLES
from backlens.errors import BacklensError
from backlens.store.tables import TABLES

BESIDE = 1 << 30
"""Bytes of address space that are left for what is not data: threads, libraries, the answer."""
UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


@contextmanager
def bounded_memory(size: str) -> Iterator[None]:
    """May take so much more than now, as `4GB` says it. Only Linux keeps such a bound."""
    most = bytes_of(size)
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    bound = pages * resource.getpagesize() + most + BESIDE
    lowest = min(limit for limit in (bound, *before) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def bytes_of(size: str) -> int:
    """`4GB` and `1.5 GiB` as DuckDB takes them."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B\s*", size, re.IGNORECASE | re.ASCII)
    if found is None:
        raise BacklensError(f"--memory {size}: write it as 2GB")
    number, unit, is_binary = found.groups()
    return int(float(number) * (1024 if is_binary else 1000) ** UNITS[unit.upper()])


QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
"""The nodes of a syntax tree that read. Others (COPY_QUERY_NODE, INSERT_QUERY_NODE, …) write."""

TABLE_FUNCTIONS = {
    "duckdb_columns",
    "duckdb_functions",
    "duckdb_tables",
    "duckdb_views",
    "generate_series",
    "histogram",
    "histogram_values",
    "json_each",
    "json_tree",
    "range",
    "repeat",
    "unnest",
}
"""What may stand in FROM besides tables. None of them opens a file or takes SQL as a string."""

PLAIN_TYPES = {
    *("boolean", "tinyint", "smallint", "integer", "bigint", "hugeint"),
    *("utinyint", "usmallint", "uinteger", "ubigint", "float", "double", "varchar", "enum", "null"),
}
"""Those that JSON has; `uhugeint` is not among them, for Arrow has no integer that holds it."""
DIGITS_OF_A_DOUBLE = 15
"""Decimal digits that every double gives back."""


def run_select(
    opened: duckdb.DuckDBPyConnection, statement: str, limit: int | None = None, as_text: bool = False
) -> pa.Table:
    """The rows of a stranger's SELECT, at most `limit`; `as_text` as `text_columns` has it."""
    # As a subquery: there DuckDB itself refuses what writes, and names apart columns of one name.
    rows = opened.sql(f"FROM ({checked_query(opened, statement)})")
    rows = rows.project(text_columns(rows)) if as_text else rows
    return (rows if limit is None else rows.limit(limit)).to_arrow_table()


def count_rows(opened: duckdb.DuckDBPyConnection, statement: str) -> int:
    """How many rows a stranger's SELECT has."""
    ((rows,),) = opened.sql(f"SELECT count(*) FROM ({checked_query(opened, statement)})").fetchall()
    return rows


def text_columns(rows: duckdb.DuckDBPyRelation) -> str:
    """The columns for a SELECT from `rows` in the types that JSON has: no value is lost in Arrow or Python then.

    Dates, times, intervals, blobs, bits and the like are DuckDB's own text; so are decimals that no double holds.
    """
    columns = [
        f"CAST({name} AS {_text_type(of)}) AS {name}" if _text_type(of) != str(of) else name
        for name, of in zip(map(_quoted, rows.columns), rows.types, strict=True)
    ]
    return ", ".join(columns)


def _text_type(of: DuckDBPyType) -> str:
    """The type that a value of this one is shown in."""
    if of.id in PLAIN_TYPES:
        return str(of)
    parts: dict[str, Any] = (
        dict(of.children) if of.id in ("decimal", "list", "array", "struct", "map") else {}
    )
    if of.id == "decimal":
        if parts["scale"] == 0:
            return "HUGEINT"
        return "DOUBLE" if parts["precision"] <= DIGITS_OF_A_DOUBLE else "VARCHAR"
    if of.id == "list":
        return f"{_text_type(parts['child'])}[]"
    if of.id == "array":
        return f"{_text_type(parts['child'])}[{parts['size']}]"
    if of.id == "struct":
        fields = ", ".join(f"{_quoted(name)} {_text_type(part)}" for name, part in parts.items())
        return f"STRUCT({fields})"
    return f"MAP(VARCHAR, {_text_type(parts['value'])})" if of.id == "map" else "VARCHAR"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def checked_query(opened: duckdb.DuckDBPyConnection, statement: str) -> str:
    """A stranger's SELECT, written anew from the tree that was checked."""
    tree = checked_tree(opened, statement)
    # (json_execute_serialized_sql would save a step, but what it runs can't be interrupted.)
    ((checked,),) = opened.execute("SELECT json_deserialize_sql($1)", [tree]).fetchall()
    return checked


def checked_tree(opened: duckdb.DuckDBPyConnection, statement: str) -> str:
    """The syntax tree, in JSON, of one SELECT (or DESCRIBE, SHOW, VALUES) that only reads."""
    tables = ", ".join([*TABLES, *ATLAS_TABLES])
    refusal = BacklensError(
        f"sql: only a single SELECT statement is run here; it can read the tables {tables}"
    )
    parsed = opened.extract_statements(statement)
    if len(parsed) != 1 or parsed[0].type != duckdb.StatementType.SELECT:
        raise refusal
    ((serialized,),) = opened.execute("SELECT json_serialize_sql($1)", [parsed[0].query]).fetchall()
    try:
        tree = json.loads(serialized)
    except RecursionError:
        raise BacklensError(
            "sql: the statement is nested too deeply to be checked; make it flatter"
        ) from None
    if tree["error"]:
        raise refusal
    for part in _parts(tree):
        kind = str(part.get("type"))
        if kind.endswith("_NODE") and kind not in QUERY_NODES:
            raise refusal
        if (
            kind == "TABLE_FUNCTION"
            and (name := part["function"]["function_name"].lower()) not in TABLE_FUNCTIONS
        ):
            raise BacklensError(f"sql: {name}(…) is not run here; read from the tables {tables}")
    return serialized


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON document."""
    left = [tree]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
