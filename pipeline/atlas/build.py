"""`backlens atlas`: derives the atlas tables of a run, piece by piece, in bounded memory.

A piece is a layer, and then a range of tokens. Its files are written under temporary names, renamed, and
recorded in `atlas/_pieces/`; `atlas/manifest.json`, written last, lists the files of all pieces. What a crash
at any instant leaves:

    within a piece      temporary files, or final names without a record: nobody reads them; the next call
                        replaces them
    between pieces      recorded pieces: the next call keeps them if the run has the same commits
    after the manifest  an atlas; files of an older one are deleted then

The files' names carry the commits they were made from (`manifest.source_of`), so an atlas in use stays whole while
the next one is built beside it.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import IO, Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.atlas.derive import DEFINITIONS
from pipeline.atlas.manifest import ATLAS, MANIFEST, CutOff, Manifest, find_manifest, source_of
from pipeline.atlas.sql import first_line, read_parquet, sql_text
from pipeline.errors import BacklensError
from pipeline.store.commit import committed
from pipeline.store.files import Directory, is_temporary
from pipeline.store.parquet import ROW_GROUP_ROWS, FileRecord, file_checksum
from pipeline.store.rundir import load_run
from schemas.atlas import ATLAS_TABLES
from schemas.tables import TABLES, Table

PIECES = f"{ATLAS}/_pieces"
LOCK = f"{ATLAS}/_build.lock"
MEMORY = "2GB"
TOKEN_PIECE_ROWS = 2**25
"""How many rows of `token_topk` are sorted at a time."""

LAYER_TABLES = ("neuron_topk", "neuron_prompts", "neuron_summary", "layer_curves")
TOKEN_TABLES = ("token_topk", "token_summary")
FACTS = ("prompts", "layers", "neurons", "tokens")


class Progress(Protocol):
    """Who watches a build."""

    def planned(self, text: str, pieces: int) -> None: ...

    def finished(self, piece: str, pieces: int, kept: bool) -> None:
        """A piece is done, of so many that are known by now; `kept`: a call before this one did it."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What is derived in one step: the tables' rows of one layer, or of tokens from `first` to `last`."""

    name: str
    tables: tuple[str, ...]
    column: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Work:
    """One call of `build_atlas`."""

    directory: Directory
    facts: Mapping[str, Sequence[str]]
    source: str
    memory: str
    spill: str

    def file(self, table: str, piece: Piece) -> str:
        return f"{ATLAS}/{table}/{piece.name}-{self.source}.parquet"

    def record(self, piece: Piece) -> str:
        return f"{PIECES}/{piece.name}-{self.source}.json"


def build_atlas(out: str | Directory, progress: Progress | None = None, memory: str = MEMORY) -> Manifest:
    """The atlas of the shards that are committed now; one that stands already is returned as it is."""
    started = time.monotonic()
    directory = Directory.at(out)
    record = load_run(directory)
    directory.makedirs(ATLAS)
    with directory.exclusively(LOCK):
        commits = committed(directory)
        if not commits:
            raise BacklensError(
                f"atlas: {directory} has no committed shard yet; let `backlens run` finish one"
            )
        standing, source = find_manifest(directory), source_of(commits)
        if standing is not None and standing.source == source:
            return standing
        _remove_leftovers(directory)
        facts = {
            table: [directory.location(commit.files[table].path) for commit in commits.values()]
            for table in FACTS
        }
        with _spilling(directory) as spill:
            work = _Work(directory, facts, source, memory, spill)
            files = _build_pieces(work, progress, _plan_line(len(commits), record.plan.shards, standing))
        manifest = Manifest(
            source=source,
            shards=len(commits),
            cut_off=CutOff.of(record.config),
            files=files,
            seconds=round(time.monotonic() - started, 3),
            written_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        directory.write_atomically(MANIFEST, manifest.to_json())
        _remove_others(directory, source)
        return manifest


def _plan_line(shards: int, planned: int, standing: Manifest | None) -> str:
    of = (
        f"{shards:,} shards"
        if shards == planned
        else f"{shards:,} of {planned:,} shards (the run is not complete)"
    )
    if standing is None:
        return f"atlas of {of}"
    return f"atlas of {of}, in the place of one of {standing.shards:,} shards, which the run has left behind"


def _build_pieces(work: _Work, progress: Progress | None, plan: str) -> dict[str, list[FileRecord]]:
    """Every piece that is not recorded already; the files of all of them, by table."""
    files: dict[str, list[FileRecord]] = {table: [] for table in ATLAS_TABLES}

    def build(piece: Piece, pieces: int) -> None:
        found = _recorded(work, piece)
        made = _build_piece(work, piece, files) if found is None else found
        for table, record in made.items():
            files[table].append(record)
        if progress is not None:
            progress.finished(piece.name, pieces, kept=found is not None)

    layers = _layer_pieces(work)
    if progress is not None:
        progress.planned(plan, len(layers))
    for piece in layers:
        build(piece, len(layers))
    tokens = _token_pieces(work, files)
    for piece in tokens:
        build(piece, len(layers) + len(tokens))
    return files


def _layer_pieces(work: _Work) -> list[Piece]:
    of_tables = " UNION ".join(
        f"SELECT DISTINCT layer FROM {table}" for table in ("layers", "neurons", "tokens")
    )
    with _connected(work) as opened:
        for table in FACTS:
            _view(opened, table, work.facts[table])
        rows = opened.execute(f"SELECT layer FROM ({of_tables}) ORDER BY layer").fetchall()
    return [Piece(f"layer-{layer:06d}", LAYER_TABLES, "layer", layer, layer) for (layer,) in rows]


def _token_pieces(work: _Work, files: Mapping[str, Sequence[FileRecord]]) -> list[Piece]:
    """Ranges of tokens with about as many entries each as are sorted at a time."""
    with _connected(work) as opened:
        _view(opened, "neuron_topk", _locations(work, files["neuron_topk"]))
        counts = opened.execute(
            "SELECT token_id, count(*) FROM neuron_topk GROUP BY token_id ORDER BY token_id"
        ).fetchall()
    pieces: list[Piece] = []
    first, rows = None, 0
    for token_id, count in counts:
        first = token_id if first is None else first
        rows += count
        if rows >= TOKEN_PIECE_ROWS or token_id == counts[-1][0]:
            pieces.append(Piece(f"tokens-{first:06d}", TOKEN_TABLES, "token_id", first, token_id))
            first, rows = None, 0
    return pieces


def _recorded(work: _Work, piece: Piece) -> dict[str, FileRecord] | None:
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


def _build_piece(
    work: _Work, piece: Piece, files: Mapping[str, Sequence[FileRecord]]
) -> dict[str, FileRecord]:
    made: dict[str, FileRecord] = {}
    with _connected(work) as opened:
        between = f"{piece.column} BETWEEN {piece.first:d} AND {piece.last:d}"
        if piece.tables == LAYER_TABLES:
            _view(opened, "prompts", work.facts["prompts"])
            for table in ("neurons", "tokens"):
                _view(opened, table, work.facts[table], between)
        else:
            _view(opened, "neuron_topk", _locations(work, files["neuron_topk"]), between)
        for table in piece.tables:
            record = _write(work, opened, piece, table)
            if record is not None:
                made[table] = record
                # What is derived from this table reads the file rather than derive it again.
                opened.execute(
                    f"CREATE VIEW {table} AS FROM {read_parquet([work.directory.location(record.path)])}"
                )
            else:
                opened.register(table, ATLAS_TABLES[table].empty())
    content = {**asdict(piece), "files": {table: asdict(record) for table, record in made.items()}}
    work.directory.write_atomically(work.record(piece), json.dumps(content, indent=1).encode())
    return made


def _write(work: _Work, opened: duckdb.DuckDBPyConnection, piece: Piece, name: str) -> FileRecord | None:
    """A table's rows of this piece, in its order, to its file; None, and no file, if there are no rows."""
    table = ATLAS_TABLES[name]
    columns = ", ".join(table.schema.names)
    rows = opened.sql(
        f"SELECT {columns} FROM ({DEFINITIONS[name]}) ORDER BY {', '.join(table.sorted_by)}"
    ).to_arrow_reader(ROW_GROUP_ROWS)
    groups = _row_groups(rows, table)
    first = next(groups, None)
    if first is None:
        return None
    written = 0

    def write(file: IO[bytes]) -> None:
        nonlocal written
        with _writer(file, table) as writer:
            writer.write_table(first)
            written += first.num_rows
            for group in groups:
                writer.write_table(group)
                written += group.num_rows

    target = work.file(name, piece)
    staged = work.directory.stage(target, write)
    with open(staged.local_path, "rb") as file:
        checksum = file_checksum(file)
        size = file.tell()
    work.directory.publish(staged)
    return FileRecord(path=target, rows=written, bytes=size, checksum=checksum)


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


def _writer(file: IO[bytes], table: Table) -> pq.ParquetWriter:
    scalars = [field.name for field in table.schema if not pa.types.is_list(field.type)]
    options: dict[str, Any] = {"write_statistics": scalars, "write_page_index": True, "compression": "zstd"}
    order = [(name, "ascending") for name in table.sorted_by]
    return pq.ParquetWriter(
        file, table.schema, sorting_columns=pq.SortingColumn.from_ordering(table.schema, order), **options
    )


@contextmanager
def _connected(work: _Work) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection of our own, for SQL of our own: it may spill to disk what memory does not hold."""
    opened = duckdb.connect(":memory:", config={"python_enable_replacements": False})
    try:
        if not work.directory.is_local:
            opened.register_filesystem(work.directory.fs)
        opened.execute(f"SET memory_limit = {sql_text(work.memory)}")
        opened.execute(f"SET temp_directory = {sql_text(work.spill)}")
        opened.execute("SET preserve_insertion_order = false")
        yield opened
    except duckdb.OutOfMemoryException as error:
        raise BacklensError(f"atlas: {first_line(error)}; give it more with --memory") from error
    except duckdb.ParserException as error:
        raise BacklensError(
            f"atlas: --memory {work.memory}: write it as 2GB ({first_line(error)})"
        ) from error
    except duckdb.IOException as error:
        raise BacklensError(f"atlas: {first_line(error)}") from error
    finally:
        opened.close()


def _view(
    opened: duckdb.DuckDBPyConnection, table: str, paths: Sequence[str], where: str | None = None
) -> None:
    if paths:
        condition = "" if where is None else f" WHERE {where}"
        opened.execute(f"CREATE VIEW {table} AS SELECT * FROM {read_parquet(paths)}{condition}")
    else:
        declared = TABLES[table] if table in TABLES else ATLAS_TABLES[table]
        opened.register(table, declared.empty())


def _locations(work: _Work, files: Sequence[FileRecord]) -> list[str]:
    return [work.directory.location(file.path) for file in files]


@contextmanager
def _spilling(directory: Directory) -> Iterator[str]:
    """A folder for what does not fit into memory: beside the atlas, where there is room for it."""
    beside = directory.path(ATLAS) if directory.is_local else None
    folder = tempfile.mkdtemp(prefix=".spill-", suffix=".tmp", dir=beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(directory: Directory) -> None:
    """What killed builds left: half-written files, and folders of spilled rows."""
    if not directory.is_local:
        return
    for name in directory.names(ATLAS):
        if is_temporary(name):
            shutil.rmtree(directory.path(f"{ATLAS}/{name}"), ignore_errors=True)
    for folder in (*(f"{ATLAS}/{table}" for table in ATLAS_TABLES), ATLAS, PIECES):
        for name in directory.names(folder):
            if is_temporary(name):
                directory.remove(f"{folder}/{name}")


def _remove_others(directory: Directory, source: str) -> None:
    """The files and records of atlases that this one replaces."""
    for folder in (*(f"{ATLAS}/{table}" for table in ATLAS_TABLES), PIECES):
        for name in directory.names(folder):
            if source not in name and not is_temporary(name):
                directory.remove(f"{folder}/{name}")
