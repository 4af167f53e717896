"""A piece of an atlas: some tables' rows of one layer, or of a range of tokens or prompts, from sources to files.

Whoever builds it, this process or a Ray worker, leaves the same rows in the same order, for they are sorted by keys
that are unique; only means may differ in their last digit, by the order in which threads add up.
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

from backlens.atlas.database import DEFINITIONS, LiteralPaths, first_line, lens_table, read_parquet, sql_text
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
"""Rows in a group where they are fewer, for who asks about one prompt reads all of its group.

Measured: from 2,048 to 16,384 an answer takes as long; with 512 three times, for there are more groups to pass by.
"""
FACTS = ("prompts", "layers", "neurons", "tokens")

Files = Mapping[str, Sequence[FileRecord]]
"""Files of the atlas by table."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is derived in one step: the tables' rows of one layer, or of tokens or prompts from `first` to `last`."""

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
    """What every piece is built from, and how; small, and sent to every worker."""

    directory: Directory
    facts: Mapping[str, Sequence[str]]
    source: str
    memory: str
    weights: "WeightSource | None"
    norm_floor: float = 0.0
    threads: int | None = None
    """DuckDB's, in each process; None for one a core."""

    def file(self, table: str, piece: Piece) -> str:
        return f"{ATLAS}/{table}/{piece.name}-{self.source}.parquet"

    def record(self, piece: Piece) -> str:
        return f"{PIECES}/{piece.name}-{self.source}.json"

    @cached_property
    def literal_paths(self) -> LiteralPaths:
        """Made where it is needed: a worker on another node has its own."""
        return LiteralPaths(self.directory)

    def locations(self, files: Sequence[FileRecord]) -> list[str]:
        return [self.directory.location(file.path) for file in files]


def recorded(work: PieceTask, piece: Piece) -> dict[str, FileRecord] | None:
    """The files of a piece that is done, if they are still there and as long as they were."""
    name = work.record(piece)
    if not work.directory.exists(name):
        return None
    try:
        content = json.loads(work.directory.read(name))
        if content["first"] != piece.first or content["last"] != piece.last:
            return None
        files = {table: FileRecord(**file) for table, file in content["files"].items()}
        whole = all(work.directory.size(file.path) == file.bytes for file in files.values())
    except (ValueError, TypeError, KeyError, FileNotFoundError):
        return None
    return files if whole else None


def build_pieces(
    work: PieceTask, pieces: Sequence[Piece], files: Files
) -> Iterator[tuple[Piece, dict[str, FileRecord]]]:
    """The files of each piece, one after the other; `files` are those of earlier pieces that these read.

    A model that they need is loaded once.
    """
    lens: WeightLens | None = None
    for piece in pieces:
        if piece.tables == WEIGHT_TABLES:
            if lens is None:
                lens = _load(work)
            made = _weight_files(work, piece, files, lens)
        else:
            made = _derived_files(work, piece, files)
        content = {**asdict(piece), "files": {table: asdict(record) for table, record in made.items()}}
        work.directory.write_atomically(work.record(piece), json_text(content, indent=1).encode())
        yield piece, made


def _load(work: PieceTask) -> "WeightLens":
    from backlens.atlas.neuron_weights import WeightLens

    assert work.weights is not None
    try:
        return WeightLens(work.weights)
    except BacklensError as error:
        raise BacklensError(f"{error} (--weights none builds the atlas without it)") from error


def _derived_files(work: PieceTask, piece: Piece, files: Files) -> dict[str, FileRecord]:
    made: dict[str, FileRecord] = {}
    with connected(work) as opened:
        if piece.tables in (LAYER_TABLES, PROMPT_TABLES):
            view(work, opened, "prompts", work.facts["prompts"])
            for table in ("neurons", "tokens"):
                view(work, opened, table, work.facts[table], piece.condition)
        else:
            view(work, opened, "neuron_topk", work.locations(files["neuron_topk"]), piece.condition)
            view(work, opened, "tokens", work.facts["tokens"])
        for table in piece.tables:
            # No filter of a view reaches the lists in which these tokens stand.
            where = f"WHERE {piece.condition}" if table == "position_topk" else ""
            record = _write_query(work, opened, piece, table, where)
            if record is not None:
                made[table] = record
                # What is derived from this table reads the file rather than derive it again.
                view(work, opened, table, work.locations([record]))
            else:
                opened.register(table, ATLAS_TABLES[table].empty())
    return made


def _weight_files(work: PieceTask, piece: Piece, files: Files, lens: "WeightLens") -> dict[str, FileRecord]:
    with connected(work) as opened:
        view(work, opened, "neuron_summary", work.locations(files["neuron_summary"]), piece.condition)
        kept = opened.sql("SELECT layer, module, expert, neuron FROM neuron_summary ORDER BY ALL")
        rows = lens.rows(kept.to_arrow_table())
    (table,) = piece.tables
    record = _write(work, piece, ATLAS_TABLES[table], iter([rows] if rows.num_rows else []))
    return {} if record is None else {table: record}


def _write_query(
    work: PieceTask, opened: duckdb.DuckDBPyConnection, piece: Piece, name: str, where: str
) -> FileRecord | None:
    """A derived table's rows of this piece, in its order, to its file; None, and no file, if there are no rows."""
    table = ATLAS_TABLES[name]
    columns = ", ".join(table.schema.names)
    rows = opened.sql(
        f"SELECT {columns} FROM ({DEFINITIONS[name]}) {where} ORDER BY {', '.join(table.sorted_by)}"
    ).to_arrow_reader(ROW_GROUP_ROWS)
    return _write(work, piece, table, _row_groups(rows, table))


def _write(work: PieceTask, piece: Piece, table: Table, groups: Iterator[pa.Table]) -> FileRecord | None:
    first = next(groups, None)
    if first is None:
        return None
    target = work.file(table.name, piece)
    rows = ROW_GROUPS.get(table.name, ROW_GROUP_ROWS)
    staged, record = stage_sorted(work.directory, target, chain([first], groups), table, rows)
    work.directory.publish(staged)
    return record


def _row_groups(batches: pa.RecordBatchReader, table: Table) -> Iterator[pa.Table]:
    """The rows in the declared types, in groups of `ROW_GROUP_ROWS`: DuckDB's batches are as long as it likes."""
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
def connected(work: PieceTask) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection of our own, for SQL of our own: it may spill to disk what memory does not hold."""
    opened = duckdb.connect(":memory:", config={"python_enable_replacements": False})
    try:
        if not work.directory.is_local:
            opened.register_filesystem(work.directory.fs)
        opened.execute(f"SET memory_limit = {sql_text(work.memory)}")
        if work.threads is not None:
            opened.execute(f"SET threads = {work.threads:d}")
        opened.execute("SET preserve_insertion_order = false")
        with _spilling(work.directory) as folder:
            opened.execute(f"SET temp_directory = {sql_text(folder)}")
            opened.execute(lens_table(work.norm_floor))
            yield opened
    except duckdb.OutOfMemoryException as error:
        raise BacklensError(f"atlas: {first_line(error)}; give it more with --memory") from error
    except duckdb.ParserException as error:
        raise BacklensError(
            f"atlas: --memory {work.memory}: write it as 2GB ({first_line(error)})"
        ) from error
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        loss = find_loss(work.directory, work.facts)
        raise BacklensError(f"atlas: {loss or first_line(error)}") from error
    finally:
        opened.close()


@contextmanager
def _spilling(directory: Directory) -> Iterator[str]:
    """A folder for what does not fit into memory: beside the atlas, where there is room for it."""
    beside = directory.path(ATLAS) if directory.is_local else None
    folder = tempfile.mkdtemp(prefix=".spill-", suffix=".tmp", dir=beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def view(
    work: PieceTask,
    opened: duckdb.DuckDBPyConnection,
    table: str,
    paths: Sequence[str],
    where: str | None = None,
) -> None:
    """Files as a view; the table without rows if there are none."""
    if paths:
        condition = "" if where is None else f" WHERE {where}"
        files = read_parquet(work.literal_paths(paths))
        opened.execute(f"CREATE VIEW {table} AS SELECT * FROM {files}{condition}")
    else:
        declared = TABLES[table] if table in TABLES else ATLAS_TABLES[table]
        opened.register(table, declared.empty())
