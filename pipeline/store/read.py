"""Reading a run's tables: the committed files and no others."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import BacklensError
from pipeline.store.commit import committed
from pipeline.store.files import Directory
from pipeline.store.verify import every_loss
from pipeline.store.vocab import VOCAB_FILE
from schemas.tables import TABLES


def table_files(directory: Directory, table: str) -> list[str]:
    """Where a table's committed files are: absolute paths or URLs, in the order of their shards."""
    return [directory.location(name) for name in committed_names(directory, table)]


def committed_names(directory: Directory, table: str) -> list[str]:
    """The same files, relative to the run directory."""
    if table not in TABLES:
        raise BacklensError(f"no table {table!r}; there are {', '.join(TABLES)}")
    if table == "vocab":
        return [VOCAB_FILE] if directory.exists(VOCAB_FILE) else []
    commits = committed(directory).values()
    return [commit.files[table].path for commit in commits if table in commit.files]


def read_table(directory: Directory, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole table in memory, shard after shard; without rows if nothing is committed yet."""
    names = committed_names(directory, table)
    if not names:
        empty = TABLES[table].empty()
        return empty if columns is None else empty.select(list(columns))
    paths = [directory.path(name) for name in names]
    wanted = None if columns is None else list(columns)
    try:
        # No partitioning: a folder's name such as `layer=3` is not a column.
        rows = pq.read_table(
            paths,
            columns=wanted,
            filesystem=directory.fs,
            partitioning=None,  # pyright: ignore[reportArgumentType]
        )
        return rows.unify_dictionaries()
    except (OSError, pa.ArrowException) as error:
        for loss in every_loss(directory, list(committed(directory).values()), [table]):
            raise BacklensError(f"out: {loss}") from error
        raise
