"""SQL over a run's tables, for people who are not trusted with more than reading them.

Every connection is thrown away after its query, sees a run's committed files as views and nothing else,
and has limits on memory and time. What a stranger writes must moreover be one SELECT that only reads,
and DuckDB's word for it is not enough: it counts `WITH w AS (COPY … TO …) SELECT …` as a SELECT, and
the table function `json_execute_serialized_sql` runs such a statement from a string; either may
overwrite the files that the views read. So the statement's own syntax tree must hold nothing but
queries, and no table functions but those known to be harmless.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.atlas.derive import DEFINITIONS
from pipeline.errors import BacklensError
from pipeline.store.files import Directory
from schemas.atlas import ATLAS_TABLES
from schemas.tables import TABLES

MAIN, OTHER = "main", "other"
"""The schemas of a connection: the run's tables, and those of the run it is compared with."""

MEMORY_LIMIT = "4GB"
"""What a question may use; a server that answers several at a time gives less."""
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


@contextmanager
def connection(
    directory: Directory,
    files: Mapping[str, Sequence[str]],
    seconds: float,
    other: tuple[Directory, Mapping[str, Sequence[str]]] | None = None,
    memory: str = MEMORY_LIMIT,
    facts_only: bool = False,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that sees `files` (by table) as views and reaches nothing else, for so many seconds.

    Another run's tables, if they are given, are views of the schema `other`. `facts_only` leaves the atlas's tables
    out: to bind them takes longer than many a question.
    """
    opened = duckdb.connect(":memory:", config={"python_enable_replacements": False})
    late = threading.Timer(seconds, opened.interrupt)
    runs = {MAIN: (directory, files)} if other is None else {MAIN: (directory, files), OTHER: other}
    try:
        for fs in {run.fs for run, _ in runs.values() if not run.is_local}:
            opened.register_filesystem(fs)
        opened.execute(f"CREATE SCHEMA {OTHER}")
        _restrict(
            opened,
            [path for _, tables in runs.values() for paths in tables.values() for path in paths],
            memory,
        )
        for schema, (_, tables) in runs.items():
            _create_views(opened, tables, schema)
        if not facts_only:
            _create_atlas_views(opened, runs[MAIN][1])
        opened.execute("SET lock_configuration = true")
        late.start()
        yield opened
    except duckdb.InterruptException as error:
        raise BacklensError(f"query: stopped after {seconds:g} s; narrow it, by layer for example") from error
    except duckdb.Error as error:
        raise BacklensError(f"query: {first_line(error)}") from error
    finally:
        late.cancel()
        opened.close()


def _restrict(opened: duckdb.DuckDBPyConnection, paths: Sequence[str], memory: str) -> None:
    opened.execute(f"SET memory_limit = {sql_text(memory)}")
    opened.execute("SET autoload_known_extensions = false")
    opened.execute("SET temp_directory = ''")  # else a large query spills into the working directory
    opened.execute(f"SET allowed_paths = {_literal_list(paths)}")
    opened.execute("SET enable_external_access = false")


def _create_views(opened: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[str]], schema: str) -> None:
    """The run's tables."""
    for table, declared in TABLES.items():
        if paths := files.get(table):
            opened.execute(f"CREATE VIEW {schema}.{table} AS FROM {read_parquet(paths)}")
        else:
            opened.register(f"empty_{schema}_{table}", declared.empty())
            opened.execute(f"CREATE VIEW {schema}.{table} AS FROM empty_{schema}_{table}")


def _create_atlas_views(opened: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[str]]) -> None:
    """The tables of the atlas: from its files, or else as they are defined."""
    for table, declared in ATLAS_TABLES.items():
        if paths := files.get(table):
            opened.execute(f"CREATE VIEW {table} AS FROM {read_parquet(paths)}")
        elif table in DEFINITIONS:
            opened.execute(f"CREATE VIEW {table} AS {DEFINITIONS[table]}")
        else:
            opened.register(table, declared.empty())


def read_parquet(paths: Sequence[str]) -> str:
    """The files as they stand in FROM."""
    return f"read_parquet({_literal_list(paths)})"


def _literal_list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(sql_text, texts))}]"


def sql_text(text: str) -> str:
    """A string as SQL, where DuckDB takes no parameters: SET and CREATE VIEW."""
    return "'" + text.replace("'", "''") + "'"


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


def first_line(error: duckdb.Error) -> str:
    """`Binder Error: Referenced column "x" not found …`, and what DuckDB proposes on the second line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(
        lines[:2] if len(lines) > 1 and lines[1].startswith(("Candidate", "Did you")) else lines[:1]
    )
