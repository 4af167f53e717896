"""SQL of people who are trusted only to read a run's tables.

A statement gets a database (`database.py`) of its own, which reaches only the run's files, and must be one SELECT that
only reads. DuckDB's statement type does not prove that: it counts `WITH w AS (COPY … TO …) SELECT …` as a SELECT, and
the table function `json_execute_serialized_sql` runs such a statement from a string; both may overwrite the files that
the views read. So the syntax tree may hold only query nodes and table functions of an allow-list.

DuckDB's memory limit does not count everything (`len(range(600000000))` takes 5 GB under any limit), so the operating
system also limits this process during the query; DuckDB then reports that memory is short, as at its own limit.
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
"""Bytes of address space beside the data: threads, libraries, the answer."""
UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


@contextmanager
def bounded_memory(size: str) -> Iterator[None]:
    """Limit the memory that this process may take in addition to now, such as `4GB`; only on Linux."""
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
    """The bytes of a size such as `4GB` or `1.5 GiB`. Raises BacklensError if it is malformed."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B\s*", size, re.IGNORECASE | re.ASCII)
    if found is None:
        raise BacklensError(f"--memory {size}: write it as 2GB")
    number, unit, is_binary = found.groups()
    return int(float(number) * (1024 if is_binary else 1000) ** UNITS[unit.upper()])


QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
"""Nodes of a syntax tree that only read. Others (COPY_QUERY_NODE, INSERT_QUERY_NODE, …) write."""

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
"""Functions that FROM may use besides tables. None of them opens a file or takes SQL as a string."""

PLAIN_TYPES = {
    *("boolean", "tinyint", "smallint", "integer", "bigint", "hugeint"),
    *("utinyint", "usmallint", "uinteger", "ubigint", "float", "double", "varchar", "enum", "null"),
}
"""Types with a JSON equivalent; without `uhugeint`, which no integer of Arrow holds."""
DIGITS_OF_A_DOUBLE = 15
"""Decimal digits that a double preserves."""


def run_select(
    opened: duckdb.DuckDBPyConnection, statement: str, limit: int | None = None, as_text: bool = False
) -> pa.Table:
    """The rows of an untrusted SELECT, at most `limit`; `as_text` applies `text_columns`."""
    # In a subquery DuckDB itself refuses statements that write, and renames columns of the same name.
    rows = opened.sql(f"FROM ({checked_query(opened, statement)})")
    rows = rows.project(text_columns(rows)) if as_text else rows
    return (rows if limit is None else rows.limit(limit)).to_arrow_table()


def count_rows(opened: duckdb.DuckDBPyConnection, statement: str) -> int:
    """The number of rows of an untrusted SELECT."""
    ((rows,),) = opened.sql(f"SELECT count(*) FROM ({checked_query(opened, statement)})").fetchall()
    return rows


def text_columns(rows: duckdb.DuckDBPyRelation) -> str:
    """The columns of a SELECT from `rows`, cast to types with a JSON equivalent, so that no value is lost.

    Dates, times, intervals, blobs, bits and decimals that no double holds become text in DuckDB's notation.
    """
    columns = [
        f"CAST({name} AS {_text_type(of)}) AS {name}" if _text_type(of) != str(of) else name
        for name, of in zip(map(_quoted, rows.columns), rows.types, strict=True)
    ]
    return ", ".join(columns)


def _text_type(of: DuckDBPyType) -> str:
    """The type to which values of a type are cast."""
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
    """An untrusted SELECT, written again from its checked syntax tree."""
    tree = checked_tree(opened, statement)
    # json_execute_serialized_sql would save a step, but what it runs cannot be interrupted.
    ((checked,),) = opened.execute("SELECT json_deserialize_sql($1)", [tree]).fetchall()
    return checked


def checked_tree(opened: duckdb.DuckDBPyConnection, statement: str) -> str:
    """The syntax tree, in JSON, of one SELECT (or DESCRIBE, SHOW, VALUES). Raises BacklensError for anything else."""
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
        raise BacklensError("sql: the statement is nested too deeply to be checked; simplify it") from None
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
