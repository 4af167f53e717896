"""Pieces of an atlas: the rows of some tables for one layer, or for a range of tokens or prompts, as files.

A piece has the same rows in the same order whether this process or a Ray worker builds it, because rows are sorted by
unique keys. Only means may differ in the last digit, which depends on the order in which threads add.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa

from backlens.atlas.database import LiteralPaths, first_line, lens_table, read_parquet, sql_text
from backlens.atlas.definitions import DEFINITIONS
from backlens.atlas.manifest import ATLAS, find_loss
from backlens.atlas.tables import ATLAS_TABLES, PROMPT_TABLES
from backlens.errors import BacklensError
from backlens.printable import json_text
from backlens.store.directory import Directory
from backlens.store.parquet import ROW_GROUP_ROWS, FileRecord, stage_sorted
from backlens.store.tables import TABLES, Table

if TYPE_CHECKING:
    from backlens.atlas.neuron_weights import WeightLens, WeightSource

PIECES = f"{ATLAS}/_pieces"
LAYER_TABLES = ("neuron_topk", "neuron_prompts", "neuron_summary", "layer_curves")
TOKEN_TABLES = ("token_topk", "token_summary", "position_topk")
WEIGHT_TABLES = ("neuron_weights",)
ROW_GROUPS: Mapping[str, int] = dict.fromkeys(PROMPT_TABLES, 8192)
"""Rows per row group of the tables whose groups are smaller, because a question about one prompt reads whole groups.

Measured: an answer takes equally long from 2,048 to 16,384 rows, and three times as long with 512 (more groups).
"""
FACTS = ("prompts", "layers", "neurons", "tokens")

Files = Mapping[str, Sequence[FileRecord]]
"""Files of the atlas, by table."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of a build: the rows of `tables` in which `column` (layer, token or prompt) is `first` to `last`."""

    name: str
    tables: tuple[str, ...]
    column: str
    first: int
    last: int

    @property
    def condition(self) -> str:
        return f"{self.column} BETWEEN {self.first:d} AND {self.last:d}"


@dataclass(frozen=True)
class PieceTask:
    """The sources and options of all pieces; small, and sent to every worker."""

    directory: Directory
    facts: Mapping[str, Sequence[str]]
    source: str
    memory: str
    weights: "WeightSource | None"
    norm_floor: float = 0.0
    threads: int | None = None
    """Threads of DuckDB per process; None for one per core."""

    def file(self, table: str, piece: Piece) -> str:
        return f"{ATLAS}/{table}/{piece.name}-{self.source}.parquet"

    def record(self, piece: Piece) -> str:
        return f"{PIECES}/{piece.name}-{self.source}.json"

    @cached_property
    def literal_paths(self) -> LiteralPaths:
        """The paths for DuckDB, made in each process: a worker on another node has its own."""
        return LiteralPaths(self.directory)

    def locations(self, files: Sequence[FileRecord]) -> list[str]:
        return [self.directory.location(file.path) for file in files]


def recorded(task: PieceTask, piece: Piece) -> dict[str, FileRecord] | None:
    """The files of a finished piece; None if there is no record of it or a file has another size."""
    name = task.record(piece)
    if not task.directory.exists(name):
        return None
    try:
        content = json.loads(task.directory.read(name))
        if content["first"] != piece.first or content["last"] != piece.last:
            return None
        files = {table: FileRecord(**file) for table, file in content["files"].items()}
        whole = all(task.directory.size(file.path) == file.bytes for file in files.values())
    except (ValueError, TypeError, KeyError, FileNotFoundError):
        return None
    return files if whole else None


def build_pieces(
    task: PieceTask, pieces: Sequence[Piece], files: Files
) -> Iterator[tuple[Piece, dict[str, FileRecord]]]:
    """Build the pieces one by one and yield the files of each.

    `files` are the files of earlier pieces, which these read. The model is loaded at most once.
    """
    lens: WeightLens | None = None
    for piece in pieces:
        if piece.tables == WEIGHT_TABLES:
            if lens is None:
                lens = _load(task)
            made = _weight_files(task, piece, files, lens)
        else:
            made = _derived_files(task, piece, files)
        content = {**asdict(piece), "files": {table: asdict(record) for table, record in made.items()}}
        task.directory.write_atomically(task.record(piece), json_text(content, indent=1).encode())
        yield piece, made


def _load(task: PieceTask) -> "WeightLens":
    from backlens.atlas.neuron_weights import WeightLens

    assert task.weights is not None
    try:
        return WeightLens(task.weights)
    except BacklensError as error:
        raise BacklensError(f"{error} (--weights none builds the atlas without it)") from error


def _derived_files(task: PieceTask, piece: Piece, files: Files) -> dict[str, FileRecord]:
    made: dict[str, FileRecord] = {}
    with connected(task) as opened:
        if piece.tables in (LAYER_TABLES, PROMPT_TABLES):
            view(task, opened, "prompts", task.facts["prompts"])
            for table in ("neurons", "tokens"):
                view(task, opened, table, task.facts[table], piece.condition)
        else:
            view(task, opened, "neuron_topk", task.locations(files["neuron_topk"]), piece.condition)
            view(task, opened, "tokens", task.facts["tokens"])
        for table in piece.tables:
            # The filter of a view cannot reach tokens inside lists.
            where = f"WHERE {piece.condition}" if table == "position_topk" else ""
            record = _write_query(task, opened, piece, table, where)
            if record is not None:
                made[table] = record
                # Tables derived from this one read its file.
                view(task, opened, table, task.locations([record]))
            else:
                opened.register(table, ATLAS_TABLES[table].empty())
    return made


def _weight_files(task: PieceTask, piece: Piece, files: Files, lens: "WeightLens") -> dict[str, FileRecord]:
    with connected(task) as opened:
        view(task, opened, "neuron_summary", task.locations(files["neuron_summary"]), piece.condition)
        kept = opened.sql("SELECT layer, module, expert, neuron FROM neuron_summary ORDER BY ALL")
        rows = lens.rows(kept.to_arrow_table())
    (table,) = piece.tables
    record = _write(task, piece, ATLAS_TABLES[table], iter([rows] if rows.num_rows else []))
    return {} if record is None else {table: record}


def _write_query(
    task: PieceTask, opened: duckdb.DuckDBPyConnection, piece: Piece, name: str, where: str
) -> FileRecord | None:
    """Write the rows of a derived table in this piece, sorted; None, and no file, if there are none."""
    table = ATLAS_TABLES[name]
    columns = ", ".join(table.schema.names)
    rows = opened.sql(
        f"SELECT {columns} FROM ({DEFINITIONS[name]}) {where} ORDER BY {', '.join(table.sorted_by)}"
    ).to_arrow_reader(ROW_GROUP_ROWS)
    return _write(task, piece, table, _row_groups(rows, table))


def _write(task: PieceTask, piece: Piece, table: Table, groups: Iterator[pa.Table]) -> FileRecord | None:
    first = next(groups, None)
    if first is None:
        return None
    target = task.file(table.name, piece)
    rows = ROW_GROUPS.get(table.name, ROW_GROUP_ROWS)
    staged, record = stage_sorted(task.directory, target, chain([first], groups), table, rows)
    task.directory.publish(staged)
    return record


def _row_groups(batches: pa.RecordBatchReader, table: Table) -> Iterator[pa.Table]:
    """The rows in the declared types and in groups of `ROW_GROUP_ROWS`; batches of DuckDB have any length."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(each.num_rows for each in waiting) >= ROW_GROUP_ROWS:
            rows = pa.Table.from_batches(waiting)
            yield rows.slice(0, ROW_GROUP_ROWS).cast(table.schema).unify_dictionaries()
            waiting = rows.slice(ROW_GROUP_ROWS).to_batches()
    if any(batch.num_rows for batch in waiting):
        yield pa.Table.from_batches(waiting).cast(table.schema).unify_dictionaries()


@contextmanager
def connected(task: PieceTask) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection for trusted SQL, which spills to disk what does not fit into memory."""
    opened = duckdb.connect(":memory:", config={"python_enable_replacements": False})
    try:
        if not task.directory.is_local:
            opened.register_filesystem(task.directory.fs)
        opened.execute(f"SET memory_limit = {sql_text(task.memory)}")
        if task.threads is not None:
            opened.execute(f"SET threads = {task.threads:d}")
        opened.execute("SET preserve_insertion_order = false")
        with _spilling(task.directory) as folder:
            opened.execute(f"SET temp_directory = {sql_text(folder)}")
            opened.execute(lens_table(task.norm_floor))
            yield opened
    except duckdb.OutOfMemoryException as error:
        raise BacklensError(f"atlas: {first_line(error)}; give it more with --memory") from error
    except duckdb.ParserException as error:
        raise BacklensError(
            f"atlas: --memory {task.memory}: write it as 2GB ({first_line(error)})"
        ) from error
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        loss = find_loss(task.directory, task.facts)
        raise BacklensError(f"atlas: {loss or first_line(error)}") from error
    finally:
        opened.close()


@contextmanager
def _spilling(directory: Directory) -> Iterator[str]:
    """A temporary folder for spilled rows: inside the atlas folder, whose disk has room."""
    beside = directory.path(ATLAS) if directory.is_local else None
    folder = tempfile.mkdtemp(prefix=".spill-", suffix=".tmp", dir=beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def view(
    task: PieceTask,
    opened: duckdb.DuckDBPyConnection,
    table: str,
    paths: Sequence[str],
    where: str | None = None,
) -> None:
    """Create a view of files, or an empty table if there are none."""
    if paths:
        condition = "" if where is None else f" WHERE {where}"
        files = read_parquet(task.literal_paths(paths))
        opened.execute(f"CREATE VIEW {table} AS SELECT * FROM {files}{condition}")
    else:
        declared = TABLES[table] if table in TABLES else ATLAS_TABLES[table]
        opened.register(table, declared.empty())
