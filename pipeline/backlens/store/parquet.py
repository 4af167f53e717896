"""The Parquet writer: one table to one file, checked against its declaration, sorted, and laid out for look-ups."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute creates its functions on import, where type checkers do not see them.)

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from backlens.store.directory import Directory, Staged
from backlens.store.tables import Table

ROW_GROUP_ROWS = 131_072
"""Rows per row group. Measured: with 8 times fewer, look-ups of neurons take 13 times as long; with 8 times more,
look-ups of tokens take 10 times as long."""
ROW_GROUP_BYTES = 256 * 2**20
"""Limit per row group. Wide rows (`factors`) get groups of fewer rows, which bounds the memory of readers."""

MOST_LIST_ITEMS = 2**31 - 1
"""Limit of Arrow, whose list offsets have 32 bits."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A written file: where it is, and facts that show whether it has changed since."""

    path: str
    """Relative to the run directory, with `/`."""
    rows: int
    bytes: int
    checksum: str
    """`sha256:` and 64 hexadecimal digits, over the file's bytes."""


def write_table(directory: Directory, name: str, rows: pa.Table, table: Table) -> FileRecord:
    """Write `rows` to the file `name` of `directory`, whole or not at all."""
    staged, record = stage_table(directory, name, rows, table)
    directory.publish(staged)
    return record


def stage_table(directory: Directory, name: str, rows: pa.Table, table: Table) -> tuple[Staged, FileRecord]:
    """Write `rows` under a temporary name; `Directory.publish` gives the file its final name."""
    check_rows(rows, table)
    return stage_sorted(directory, name, [sort_rows(rows, table)], table)


def stage_sorted(
    directory: Directory,
    name: str,
    pieces: Iterable[pa.Table],
    table: Table,
    row_group_rows: int | None = None,
) -> tuple[Staged, FileRecord]:
    """Write rows that are checked and sorted already. Pieces are written one by one, so that memory holds one only."""
    count = 0

    def write(file: IO[bytes]) -> None:
        nonlocal count
        with pq.ParquetWriter(file, table.schema, **writer_options(table)) as writer:
            for rows in pieces:
                if (
                    rows.num_rows
                ):  # `datasets` cannot read a row group of 0 rows; it can read a file of no groups
                    rows = rows.replace_schema_metadata(table.schema.metadata)
                    writer.write_table(rows, row_group_rows or _row_group_rows(rows))
                    count += rows.num_rows

    staged = directory.stage(name, write)
    with open(staged.local_path, "rb") as file:
        checksum = file_checksum(file)
        size = file.tell()
    return staged, FileRecord(path=name, rows=count, bytes=size, checksum=checksum)


def check_rows(rows: pa.Table, table: Table) -> None:
    """Raise ValueError for rows that differ from the declaration: a defect of the code, so no BacklensError."""
    declared = table.schema
    if not rows.schema.equals(declared):
        differing = [
            f"{field.name}: {field.type}{'' if field.nullable else ' not null'}"
            for field in rows.schema
            if field.name not in declared.names or not field.equals(declared.field(field.name))
        ]
        raise ValueError(
            f"table {table.name}: the rows' schema is not the declared one; "
            f"differing: {', '.join(differing) or 'none'}; "
            f"columns: {rows.schema.names}, declared: {declared.names}"
        )
    for column in table.columns:
        values = rows.column(column.name)
        if not column.nullable and values.null_count:
            raise ValueError(f"table {table.name}: {values.null_count} nulls in column {column.name}")
        if isinstance(column.type, pa.ListType) and any(
            chunk.flatten().null_count for chunk in values.chunks
        ):
            raise ValueError(f"table {table.name}: null items in the lists of column {column.name}")


def sort_rows(rows: pa.Table, table: Table) -> pa.Table:
    """The rows in the table's order, which is stable, with nulls last. Sorted rows are returned without a copy."""
    keys = pa.table({name: _sortable(rows.column(name)) for name in table.sort_keys})
    order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in table.sort_keys])
    return rows if _is_identity(order) else _take(rows.unify_dictionaries(), order)


def _sortable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # Arrow cannot sort by dictionary columns among others.
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_identity(order: pa.Array) -> bool:
    """True if every index of the permutation is one more than the index before it."""
    steps = pc.pairwise_diff(order.cast(pa.int64()))
    return pc.all(pc.equal(steps, 1)).as_py() in (True, None)  # None: fewer than two rows


def _take(rows: pa.Table, order: pa.Array) -> pa.Table:
    """`rows.take(order)`, also for list columns with more items than one Arrow array can hold."""
    lists = [column for column in rows.columns if pa.types.is_list(column.type)]
    if all(sum(len(chunk.values) for chunk in column.chunks) <= MOST_LIST_ITEMS for column in lists):
        return rows.take(order)
    batches = rows.to_batches()
    step = _row_group_rows(rows)
    pieces = [_gather(batches, order.slice(start, step)) for start in range(0, len(order), step)]
    return pa.concat_tables(pieces)


def _gather(batches: list[pa.RecordBatch], wanted: pa.Array) -> pa.Table:
    """The rows `wanted`, in that order: taken batch by batch, then brought into order."""
    parts, places, first = [], [], 0
    for batch in batches:
        here = pc.and_(pc.greater_equal(wanted, first), pc.less(wanted, first + batch.num_rows))
        places.append(pc.indices_nonzero(here))
        parts.append(batch.take(pc.subtract(wanted.filter(here), first)))
        first += batch.num_rows
    return pa.Table.from_batches(parts).take(pc.sort_indices(pa.concat_arrays(places)))


def writer_options(table: Table) -> dict[str, Any]:
    """Options of the Parquet writer: zstd, byte-stream-split for floats, dictionaries for the rest, statistics of
    scalars, and a page index."""
    leaves = [_leaf(field) for field in table.schema]
    order = [(name, "ascending") for name in table.sorted_by]
    return {
        "compression": "zstd",
        "use_dictionary": [path for path, leaf_type in leaves if not pa.types.is_floating(leaf_type)],
        # Not float16: DuckDB reads byte-stream-split for wider types only.
        "use_byte_stream_split": [path for path, leaf_type in leaves if leaf_type == pa.float32()],
        "write_statistics": [field.name for field in table.schema if not pa.types.is_list(field.type)],
        "write_page_index": True,
        "sorting_columns": pq.SortingColumn.from_ordering(table.schema, order),
    }


def _leaf(field: pa.Field) -> tuple[str, pa.DataType]:
    """A column's path in the Parquet file, and the type of its values."""
    if isinstance(field.type, pa.ListType):
        return f"{field.name}.list.element", field.type.value_type
    return field.name, field.type


def _row_group_rows(rows: pa.Table) -> int:
    bytes_per_row = max(1, rows.nbytes // max(1, rows.num_rows))
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // bytes_per_row))


def file_checksum(file: IO[bytes]) -> str:
    """The checksum of the bytes from the current position of `file` on."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"
