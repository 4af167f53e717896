"""A run's tables in DuckDB: its files as views, nothing else within reach, and limits on memory and time.

One that is opened once answers many questions of ours, several at a time: each has a cursor of its own, and all share
the memory and what is known of the files. What a stranger writes gets one that is thrown away (`connection`).
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import duckdb

from pipeline.atlas.derive import DEFINITIONS
from pipeline.errors import BacklensError
from pipeline.store.files import Directory
from schemas.atlas import ATLAS_TABLES
from schemas.tables import TABLES, Table

MAIN, OTHER = "main", "other"
"""The schemas: the run's tables, and those of the run it is compared with."""
MEMORY_LIMIT = "4GB"
"""What questions may use together; a server gives less."""

Files = Mapping[str, Sequence[str]]
"""Where a run's files are, by table."""


class TooLarge(BacklensError):
    """A question takes more memory than it is given."""


class Database:
    """A run's files as views of `main`, those of another run, if there is one, as views of `other`."""

    def __init__(
        self,
        directory: Directory,
        files: Files,
        memory: str = MEMORY_LIMIT,
        other: tuple[Directory, Files] | None = None,
        derived: Sequence[str] = tuple(ATLAS_TABLES),
        is_kept: bool = False,
        norm_floor: float = 0.0,
    ) -> None:
        """`derived` are the tables of the atlas that will be asked for: to bind all takes longer than many a question.

        One that `is_kept` for many questions has the vocabulary in memory, where all of them look up their texts.
        Raises BacklensError if a file is not there.
        """
        runs = {MAIN: (directory, files)} if other is None else {MAIN: (directory, files), OTHER: other}
        self._memory = memory
        self._opened = duckdb.connect(":memory:", config={"python_enable_replacements": False})
        with _errors_as_ours(memory):
            for fs in {run.fs for run, _ in runs.values() if not run.is_local}:
                self._opened.register_filesystem(fs)
            self._opened.execute(f"CREATE SCHEMA {OTHER}")
            paths = [path for _, tables in runs.values() for paths in tables.values() for path in paths]
            _restrict(self._opened, paths, memory)
            for schema, (_, tables) in runs.items():
                for name, table in TABLES.items():
                    is_loaded = is_kept and name == "vocab"
                    _create(self._opened, f"{schema}.{name}", table, tables.get(name), is_loaded=is_loaded)
            self._opened.execute(lens_table(norm_floor))
            for name in derived:
                _create(self._opened, name, ATLAS_TABLES[name], files.get(name), DEFINITIONS.get(name))
            self._opened.execute("SET GLOBAL lock_configuration = true")

    @contextmanager
    def question(self, seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that may be used for so many seconds. Errors of DuckDB's leave as BacklensError."""
        asked = self._opened.cursor()
        late = threading.Timer(seconds, asked.interrupt)
        late.start()
        try:
            with _errors_as_ours(self._memory, seconds):
                yield asked
        finally:
            late.cancel()
            asked.close()

    def close(self) -> None:
        """Questions that are being asked are still answered."""
        self._opened.close()


@contextmanager
def connection(database: Database, seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """The one question that is put to a database."""
    with closing(database), database.question(seconds) as opened:
        yield opened


@contextmanager
def _errors_as_ours(memory: str, seconds: float = 0.0) -> Iterator[None]:
    try:
        yield
    except duckdb.InterruptException as error:
        raise BacklensError(f"query: stopped after {seconds:g} s; narrow it, by layer for example") from error
    except (duckdb.OutOfMemoryException, MemoryError) as error:
        raise TooLarge(
            f"query: it takes more memory than the {memory} that it is given; narrow it, by layer for example"
        ) from error
    except duckdb.Error as error:
        raise BacklensError(f"query: {first_line(error)}") from error


def _restrict(opened: duckdb.DuckDBPyConnection, paths: Sequence[str], memory: str) -> None:
    opened.execute(f"SET GLOBAL memory_limit = {sql_text(memory)}")
    opened.execute("SET GLOBAL autoload_known_extensions = false")
    opened.execute("SET GLOBAL temp_directory = ''")  # else a large query spills into the working directory
    opened.execute("SET GLOBAL parquet_metadata_cache = true")
    opened.execute(f"SET GLOBAL allowed_paths = {_literal_list(paths)}")
    opened.execute("SET GLOBAL enable_external_access = false")


def _create(
    opened: duckdb.DuckDBPyConnection,
    name: str,
    table: Table,
    paths: Sequence[str] | None,
    definition: str | None = None,
    is_loaded: bool = False,
) -> None:
    """A table from its files, or else as it is defined, or else without rows."""
    if paths:
        kind = "TABLE" if is_loaded else "VIEW"
        opened.execute(f"CREATE {kind} {name} AS FROM {read_parquet(paths)}")
    elif definition is not None:
        opened.execute(f"CREATE VIEW {name} AS {definition}")
    else:
        opened.register("nothing", table.empty())  # seen by this cursor alone, so a table is made of it
        opened.execute(f"CREATE TABLE {name} AS FROM nothing")
        opened.unregister("nothing")


def lens_table(norm_floor: float) -> str:
    """Makes the table `lens`, of one row, that definitions and questions read."""
    return f"CREATE TABLE lens AS SELECT {norm_floor!r}::DOUBLE AS norm_floor"


def read_parquet(paths: Sequence[str]) -> str:
    """The files as they stand in FROM."""
    return f"read_parquet({_literal_list(paths)})"


def _literal_list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(sql_text, texts))}]"


def sql_text(text: str) -> str:
    """A string as SQL, where DuckDB takes no parameters: SET and CREATE VIEW."""
    return "'" + text.replace("'", "''") + "'"


def first_line(error: duckdb.Error) -> str:
    """`Binder Error: Referenced column "x" not found …`, and what DuckDB proposes on the second line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(
        lines[:2] if len(lines) > 1 and lines[1].startswith(("Candidate", "Did you")) else lines[:1]
    )
