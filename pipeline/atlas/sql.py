"""SQL over a run's tables, for people who are not trusted with more than reading them.

What a stranger writes gets a database (`database.py`) of its own, which reaches the run's files only. It must
moreover be one SELECT that only reads, and DuckDB's word for it is not enough: it counts
`WITH w AS (COPY … TO …) SELECT …` as a SELECT, and the table function `json_execute_serialized_sql` runs such a
statement from a string; either may overwrite the files that the views read. So the statement's own syntax tree must
hold nothing but queries, and no table functions but those known to be harmless.
"""

import json
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.errors import BacklensError
from schemas.atlas import ATLAS_TABLES
from schemas.tables import TABLES

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


def run_select(opened: duckdb.DuckDBPyConnection, statement: str, limit: int) -> pa.Table:
    """At most `limit` rows of a stranger's SELECT."""
    # As a subquery: there DuckDB itself refuses what writes.
    return opened.sql(checked_query(opened, statement)).limit(limit).to_arrow_table()


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
