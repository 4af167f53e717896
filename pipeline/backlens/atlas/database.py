"""The tables of a run in DuckDB.

A `Snapshot` lists the files that a run had at one moment. A `Database` shows them as views, with nothing else within
reach and with limits on memory and time. A database that is kept answers many questions, several at a time: each has a
cursor of its own, and all share the memory. SQL of a stranger gets a database for that one question (`connection`).
A missing or damaged file stops only the questions that read its table.
"""

import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import duckdb

from backlens.atlas.definitions import DEFINITIONS
from backlens.atlas.manifest import MANIFEST, CutOff, Manifest, find_loss, find_manifest, source_of
from backlens.atlas.tables import ATLAS_TABLES, PROMPT_TABLES
from backlens.errors import BacklensError
from backlens.store.commit import VOCAB_FILE, committed, table_file
from backlens.store.directory import Directory
from backlens.store.run_record import RunRecord, load_run, refuse_other_kind
from backlens.store.tables import TABLES, Table

MAIN, OTHER = "main", "other"
"""The schemas of the run's tables and of those of the run that it is compared with."""
MEMORY_LIMIT = "4GB"
"""Memory that all questions share; a server gives less."""

Files = Mapping[str, Sequence[str]]
"""Locations of a run's files, by table."""


class LiteralPaths:
    """The files of a directory under names without `*`, `?` and `[`, which DuckDB reads as patterns.

    On a local disk the names go through a symbolic link, because not every name can be escaped (a backslash before
    such a sign, or at the start of the next name, cannot). The link is removed together with this object.
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
    """A question takes more memory than its limit."""


class Database:
    """A run's files as views of the schema `main`; those of a second run, if there is one, as views of `other`."""

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
        """Open the files.

        `derived` names the atlas tables that are needed: to bind all of them takes longer than most questions.
        A database that `is_kept` for many questions holds the vocabulary in memory: every question looks up texts.
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
                # DuckDB looks up a remote pattern under both of its names.
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
        """Create a table from its files, else from its definition, else without rows."""
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
        """A cursor for at most `seconds`. Errors of DuckDB become BacklensError."""
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
        """Close the database; running questions are still answered."""
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
        """The line about the lost file that caused an error; None if no file is lost."""
        for loss in self._losses:
            if loss in str(error):
                return loss
        if isinstance(error, duckdb.BinderException | duckdb.ParserException | duckdb.CatalogException):
            return None
        losses = (find_loss(directory, tables) for directory, tables in self._runs.values())
        return next((loss for loss in losses if loss is not None), None)


@contextmanager
def connection(database: Database, seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """A cursor for a single question; the database is closed after it."""
    with closing(database), database.question(seconds) as opened:
        yield opened


def _restrict(opened: duckdb.DuckDBPyConnection, paths: Sequence[str], memory: str) -> None:
    opened.execute(f"SET GLOBAL memory_limit = {sql_text(memory)}")
    opened.execute("SET GLOBAL autoload_known_extensions = false")
    opened.execute(
        "SET GLOBAL temp_directory = ''"
    )  # by default a large query spills into the working directory
    opened.execute("SET GLOBAL parquet_metadata_cache = true")
    opened.execute(f"SET GLOBAL allowed_paths = {_literal_list(paths)}")
    opened.execute("SET GLOBAL enable_external_access = false")


def _create_without_files(
    opened: duckdb.DuckDBPyConnection, name: str, table: Table, definition: str | None
) -> None:
    if definition is not None:
        opened.execute(f"CREATE VIEW {name} AS {definition}")
        return
    opened.register("nothing", table.empty())  # only this cursor sees it, so copy it into a table
    opened.execute(f"CREATE TABLE {name} AS FROM nothing")
    opened.unregister("nothing")


def _create_lost(opened: duckdb.DuckDBPyConnection, name: str, table: Table, loss: str) -> None:
    """Create a view that fails with `loss` as soon as a question needs its rows or their number."""
    opened.register("nothing", table.empty())
    columns = opened.execute("SELECT column_name, column_type FROM (DESCRIBE nothing)").fetchall()
    opened.unregister("nothing")
    failing = f"error({sql_text(loss)})"
    selected = ", ".join(f'{failing}::{kind} AS "{column}"' for column, kind in columns)
    opened.execute(f"CREATE VIEW {name} AS SELECT {selected} FROM range(1) WHERE {failing} IS NULL")


def lens_table(norm_floor: float) -> str:
    """The statement that creates the table `lens`, of one row, which definitions and questions read."""
    return f"CREATE TABLE lens AS SELECT {norm_floor!r}::DOUBLE AS norm_floor"


def read_parquet(paths: Sequence[str]) -> str:
    """The files as a table function for FROM. A folder named `layer=3` adds no column."""
    return f"read_parquet({_literal_list(paths)}, hive_partitioning = false)"


def _literal_list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(sql_text, texts))}]"


def sql_text(text: str) -> str:
    """A string literal, for statements in which DuckDB takes no parameters: SET and CREATE VIEW."""
    return "'" + text.replace("'", "''") + "'"


def first_line(error: duckdb.Error) -> str:
    """The first line of an error of DuckDB, with its proposal from the second line if there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(
        lines[:2] if len(lines) > 1 and lines[1].startswith(("Candidate", "Did you")) else lines[:1]
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files that a run had at one moment."""

    directory: Directory
    record: RunRecord
    files: Mapping[str, Sequence[str]]
    """Locations of the committed files by table, with those of the atlas if it is current."""
    shards: int
    """Number of committed shards."""
    manifest: Manifest | None
    """The record of the atlas, current or not; None without an atlas."""
    is_current: bool
    """True if the atlas was built from exactly these shards."""
    is_foreign: bool
    """True if there is an atlas that this version cannot read."""

    @classmethod
    def open(cls, out: str | Directory) -> "Snapshot":
        """The run in the directory or at the URL `out`, as it is now."""
        directory = Directory.at(out)
        record = load_run(directory)
        manifest = find_manifest(directory)
        commits = committed(directory)
        files = {
            table: [directory.location(c.files[table].path) for c in commits.values() if table in c.files]
            for table in TABLES
        }
        # The vocabulary is written before the first shard, so a run with a shard has lost it if it is missing.
        has_vocab = record.kind == "run" and (bool(commits) or directory.exists(VOCAB_FILE))
        files["vocab"] = [directory.location(VOCAB_FILE)] if has_vocab else []
        is_current = manifest is not None and manifest.source == source_of(commits, norm_floor(record))
        if manifest is not None and is_current:
            for table, records in manifest.files.items():
                files[table] = [directory.location(file.path) for file in records]
        is_foreign = manifest is None and directory.exists(MANIFEST)
        return cls(directory, record, files, len(commits), manifest, is_current, is_foreign)

    def require_run(self) -> None:
        """Raise BacklensError for an edit sweep, which only SQL can read."""
        refuse_other_kind(self.directory, self.record, "run")

    @property
    def cut_off(self) -> CutOff:
        """The rule by which the run keeps neurons."""
        return CutOff.of(self.record.config)

    @property
    def note(self) -> str | None:
        """A warning for readers of results if the run is not complete or its atlas not current; else None."""
        planned, out = self.record.plan.shards, self.directory
        progress = f"{out} is not complete: these are {self.shards} of its {planned} shards"
        notes = [progress if self.shards < planned else None, self.atlas_note]
        return "; ".join(note for note in notes if note) or None

    @property
    def atlas_note(self) -> str | None:
        """The reason why the atlas in the directory is not read; None if it is read or there is none."""
        remedy = f"is not read; `backlens atlas {self.directory}` builds it again"
        if self.is_foreign:
            return f"the atlas of {self.directory} was written by another version and {remedy}"
        if self.manifest is not None and not self.is_current:
            return (
                f"the atlas of {self.directory} is of {self.manifest.shards} shards and no longer the run's, "
                f"so it {remedy}"
            )
        return None

    def database(
        self, memory: str = MEMORY_LIMIT, other: "Snapshot | None" = None, is_kept: bool = False
    ) -> Database:
        """A database of these tables, and of those of `other` in the schema `other`."""
        beside = None if other is None else (other.directory, other.files)
        return Database(
            self.directory, self.files, memory, beside, is_kept=is_kept, norm_floor=norm_floor(self.record)
        )

    def prompt_database(self, prompt_id: int, memory: str = MEMORY_LIMIT) -> Database:
        """A database of the prompt's shard only, for questions about one prompt of a run without an atlas.

        If the shard is not there, the database has all shards, so that an error can say what there is.
        """
        shard = prompt_id // self.record.plan.shard_prompts
        own = {
            table: [path for path in self.files[table] if path.endswith(f"/{table_file(table, shard)}")]
            for table in TABLES
            if table != "vocab"
        }
        files = own | {"vocab": self.files["vocab"]} if own["prompts"] else self.files
        return Database(
            self.directory, files, memory, derived=PROMPT_TABLES, norm_floor=norm_floor(self.record)
        )


def norm_floor(record: RunRecord) -> float:
    """The L2 norm below which a vector's lists are led by the final norm's bias; 0 where a run does not say."""
    return float(record.model.get("norm_floor") or 0.0)
