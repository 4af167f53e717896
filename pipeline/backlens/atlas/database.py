"""A run's tables in DuckDB: its files as views, nothing else within reach, and limits on memory and time.

One that is opened once answers many questions of ours, several at a time: each has a cursor of its own, and all share
the memory and what is known of the files. What a stranger writes gets one that is thrown away (`connection`).
A table of which a file is missing or damaged stops only the questions that read it.
"""

import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import duckdb

from backlens.atlas.derived_tables import DEFINITIONS
from backlens.atlas.manifest import find_loss
from backlens.atlas.tables import ATLAS_TABLES
from backlens.errors import BacklensError
from backlens.store.directory import Directory
from backlens.store.tables import TABLES, Table

MAIN, OTHER = "main", "other"
"""The schemas: the run's tables, and those of the run it is compared with."""
MEMORY_LIMIT = "4GB"
"""What questions may use together; a server gives less."""

Files = Mapping[str, Sequence[str]]
"""Where a run's files are, by table."""


class LiteralPaths:
    """A directory's files under names that DuckDB takes as they stand: it reads `*`, `?` and `[` as patterns.

    On a local disk they go by a link to the directory, for not every name has a spelling that DuckDB does not read
    (a backslash before such a sign, or at the start of a name beside it). The link is gone with this object.
    """

    def __init__(self, directory: Directory) -> None:
        self._root = self._literal = directory.root
        if not re.search(r"[*?\[\\]", directory.root):
            return
        if not directory.is_local:
            self._literal = re.sub(r"([*?\[])", r"[\1]", directory.root)
            return
        try:
            folder = tempfile.mkdtemp(prefix="backlens-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._literal = os.path.join(folder, "run")
            os.symlink(directory.root, self._literal)
        except OSError as error:
            raise BacklensError(
                f"query: {directory} has signs of a pattern in its name and cannot be linked to from "
                f"{tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder that can be written"
            ) from error

    def __call__(self, paths: Sequence[str]) -> list[str]:
        return [self._literal + path.removeprefix(self._root) for path in paths]


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
        """
        self._runs = {MAIN: (directory, files)} if other is None else {MAIN: (directory, files), OTHER: other}
        self._paths = {schema: LiteralPaths(run) for schema, (run, _) in self._runs.items()}
        self._losses: list[str] = []
        self._memory = memory
        self._opened = duckdb.connect(":memory:", config={"python_enable_replacements": False})
        with self._errors_as_ours():
            for fs in {run.fs for run, _ in self._runs.values() if not run.is_local}:
                self._opened.register_filesystem(fs)
            self._opened.execute(f"CREATE SCHEMA {OTHER}")
            every = [
                path
                for schema, (_, tables) in self._runs.items()
                for paths in tables.values()
                # A remote pattern is looked up under both its names.
                for path in {*paths, *self._paths[schema](paths)}
            ]
            _restrict(self._opened, every, memory)
            for schema, (_, tables) in self._runs.items():
                for name, table in TABLES.items():
                    is_loaded = is_kept and name == "vocab"
                    self._create(schema, name, table, tables.get(name), is_loaded=is_loaded)
            self._opened.execute(lens_table(norm_floor))
            for name in derived:
                self._create(MAIN, name, ATLAS_TABLES[name], files.get(name), DEFINITIONS.get(name))
            self._opened.execute("SET GLOBAL lock_configuration = true")

    def _create(
        self,
        schema: str,
        name: str,
        table: Table,
        paths: Sequence[str] | None,
        definition: str | None = None,
        is_loaded: bool = False,
    ) -> None:
        """A table from its files, or else as it is defined, or else without rows."""
        whole = f"{schema}.{name}"
        if not paths:
            _create_without_files(self._opened, whole, table, definition)
            return
        kind = "TABLE" if is_loaded else "VIEW"
        try:
            self._opened.execute(f"CREATE {kind} {whole} AS FROM {read_parquet(self._paths[schema](paths))}")
        except duckdb.Error:
            directory, _ = self._runs[schema]
            loss = find_loss(directory, {name: paths})
            if loss is None:
                raise
            self._losses.append(loss)
            _create_lost(self._opened, whole, table, loss)

    @contextmanager
    def question(self, seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that may be used for so many seconds. Errors of DuckDB's leave as BacklensError."""
        asked = self._opened.cursor()
        late = threading.Timer(seconds, asked.interrupt)
        late.start()
        try:
            with self._errors_as_ours(seconds):
                yield asked
        finally:
            late.cancel()
            asked.close()

    def close(self) -> None:
        """Questions that are being asked are still answered."""
        self._opened.close()

    @contextmanager
    def _errors_as_ours(self, seconds: float = 0.0) -> Iterator[None]:
        try:
            yield
        except duckdb.InterruptException as error:
            raise BacklensError(
                f"query: stopped after {seconds:g} s; narrow it, by layer for example"
            ) from error
        except (duckdb.OutOfMemoryException, MemoryError) as error:
            raise TooLarge(
                f"query: it takes more memory than the {self._memory} that it is given; "
                "narrow it, by layer for example"
            ) from error
        except duckdb.Error as error:
            raise BacklensError(self._loss_behind(error) or f"query: {first_line(error)}") from error

    def _loss_behind(self, error: duckdb.Error) -> str | None:
        """The lost file that an error comes from, if it comes from one."""
        for loss in self._losses:
            if loss in str(error):
                return loss
        if isinstance(error, duckdb.BinderException | duckdb.ParserException | duckdb.CatalogException):
            return None
        losses = (find_loss(directory, tables) for directory, tables in self._runs.values())
        return next((loss for loss in losses if loss is not None), None)


@contextmanager
def connection(database: Database, seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """The one question that is put to a database."""
    with closing(database), database.question(seconds) as opened:
        yield opened


def _restrict(opened: duckdb.DuckDBPyConnection, paths: Sequence[str], memory: str) -> None:
    opened.execute(f"SET GLOBAL memory_limit = {sql_text(memory)}")
    opened.execute("SET GLOBAL autoload_known_extensions = false")
    opened.execute("SET GLOBAL temp_directory = ''")  # else a large query spills into the working directory
    opened.execute("SET GLOBAL parquet_metadata_cache = true")
    opened.execute(f"SET GLOBAL allowed_paths = {_literal_list(paths)}")
    opened.execute("SET GLOBAL enable_external_access = false")


def _create_without_files(
    opened: duckdb.DuckDBPyConnection, name: str, table: Table, definition: str | None
) -> None:
    if definition is not None:
        opened.execute(f"CREATE VIEW {name} AS {definition}")
        return
    opened.register("nothing", table.empty())  # seen by this cursor alone, so a table is made of it
    opened.execute(f"CREATE TABLE {name} AS FROM nothing")
    opened.unregister("nothing")


def _create_lost(opened: duckdb.DuckDBPyConnection, name: str, table: Table, loss: str) -> None:
    """A view that fails with `loss` as soon as a question needs a row of it, or the number of its rows."""
    opened.register("nothing", table.empty())
    columns = opened.execute("SELECT column_name, column_type FROM (DESCRIBE nothing)").fetchall()
    opened.unregister("nothing")
    failing = f"error({sql_text(loss)})"
    selected = ", ".join(f'{failing}::{kind} AS "{column}"' for column, kind in columns)
    opened.execute(f"CREATE VIEW {name} AS SELECT {selected} FROM range(1) WHERE {failing} IS NULL")


def lens_table(norm_floor: float) -> str:
    """Makes the table `lens`, of one row, that definitions and questions read."""
    return f"CREATE TABLE lens AS SELECT {norm_floor!r}::DOUBLE AS norm_floor"


def read_parquet(paths: Sequence[str]) -> str:
    """The files as they stand in FROM. A folder's name such as `layer=3` is not a column."""
    return f"read_parquet({_literal_list(paths)}, hive_partitioning = false)"


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
