"""Shards and their commits: when rows count, and what a crash leaves. Also the vocabulary, one file per run.

A shard is a contiguous range of prompts. It is in one of these states:

    absent      it has no files, or only temporary ones
    staged      all its files are written and fsynced under temporary names
    renamed     some or all of its files have their final names; nobody reads them
    committed   its record `_commits/<shard:06d>.json` exists; readers see all of its rows at once

`commit_shard` takes a shard from the first state to the last. A crash leaves:

    while staging       temporary files; `Directory.remove_leftovers` deletes them at the next start
    while renaming      files with final names that no record lists, so nobody reads them; the next attempt at the
                        shard replaces them
    after the record    a committed shard

The record is fsynced after the files that it names, so a power cut cannot take these files from a committed shard.
One worker at a time goes from staged to committed (`_commits.lock`). A worker that outlives its driver and finds the
shard committed deletes its own files and returns the existing record, so no committed file is replaced. Object stores
have no such lock: between the check for a record and its last put, such a worker can replace files by its own files of
the same rows. `verify` (status.py) finds them if they differ in a single byte.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import pyarrow as pa

from backlens.errors import BacklensError
from backlens.printable import json_text
from backlens.store.directory import Directory, Staged
from backlens.store.lock import exclusively
from backlens.store.parquet import FileRecord, stage_table, write_table
from backlens.store.tables import TABLES, declared_table

VOCAB_FILE = "vocab/part-0.parquet"


def write_vocab(
    directory: Directory,
    tokens: Sequence[str],
    token_bytes: Sequence[bytes],
    token_ids: Sequence[int] | None = None,
) -> None:
    """Write one row per token of `token_ids` (None: all): token i is `tokens[i]`, with the bytes `token_bytes[i]`.

    An existing vocabulary is left as it is.
    """
    if directory.exists(VOCAB_FILE):
        return
    token_ids = range(len(tokens)) if token_ids is None else token_ids
    rows = pa.table(
        {
            "token_id": token_ids,
            "token": [tokens[index] for index in token_ids],
            "bytes": [token_bytes[index] for index in token_ids],
        },
        schema=TABLES["vocab"].schema,
    )
    write_table(directory, VOCAB_FILE, rows, TABLES["vocab"])


COMMITS = "_commits"
COMMIT_LOCK = "_commits.lock"
SHARD_TABLES = ("prompts", "layers", "neurons", "tokens", "failures")
"""Tables of a run. Every shard has a file of each, even one without rows, so that each can be queried."""
OPTIONAL_TABLES = ("factors",)
SWEEP_TABLES = ("edits",)
"""Tables of an edit sweep."""


@dataclass(frozen=True, slots=True)
class ShardCommit:
    """The record of a committed shard: the content of `_commits/<shard:06d>.json`."""

    shard: int
    first_prompt: int
    """`prompt_id` of the shard's first prompt."""
    prompts: int
    """Number of prompts in the shard, failed ones included."""
    files: Mapping[str, FileRecord]
    """File by table."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """Measurements of the worker, such as seconds per stage."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package versions of the worker that wrote the shard."""
    written_at: str = ""
    """ISO 8601, UTC."""

    @property
    def rows(self) -> dict[str, int]:
        return {table: record.rows for table, record in self.files.items()}

    def to_json(self) -> bytes:
        return json_text(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes, where: str) -> "ShardCommit":
        try:
            fields = json.loads(content)
            fields["files"] = {table: FileRecord(**record) for table, record in fields["files"].items()}
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BacklensError(
                f"{where}: not a shard record ({error}); delete the file and run the same command again"
            ) from error


def commit_shard(
    directory: Directory,
    shard: int,
    tables: Mapping[str, pa.Table],
    *,
    first_prompt: int,
    prompts: int,
    stats: Mapping[str, float] | None = None,
    versions: Mapping[str, str] | None = None,
    always: Sequence[str] = SHARD_TABLES,
) -> ShardCommit:
    """Sort and write a shard's tables, then its record. A table of `always` that is not given is written without rows.

    Returns the record in the directory, which is another worker's if that worker committed the shard first.
    """
    started = time.perf_counter()
    rows = _every_table(tables, always)
    with ExitStack() as discarding:
        staged: list[Staged] = []
        files: dict[str, FileRecord] = {}
        for name, table_rows in rows.items():
            declared = declared_table(name, table_rows.schema)
            file, files[name] = stage_table(directory, table_file(name, shard), table_rows, declared)
            discarding.callback(file.discard)
            staged.append(file)
        directory.makedirs(COMMITS)
        with exclusively(directory, COMMIT_LOCK):
            if (existing := find_commit(directory, shard)) is not None:
                return existing
            for file in staged:
                directory.publish(file)
            commit = ShardCommit(
                shard=shard,
                first_prompt=first_prompt,
                prompts=prompts,
                files=files,
                stats={**(stats or {}), "seconds_write": time.perf_counter() - started},
                versions=dict(versions or {}),
                written_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            directory.write_atomically(record_file(shard), commit.to_json())
            return commit


def _every_table(tables: Mapping[str, pa.Table], always: Sequence[str]) -> dict[str, pa.Table]:
    unknown = set(tables) - {*always, *OPTIONAL_TABLES}
    if unknown:
        raise ValueError(f"no such tables in a shard: {', '.join(sorted(unknown))}")
    present = [*always, *(name for name in OPTIONAL_TABLES if name in tables)]
    return {name: tables[name] if name in tables else TABLES[name].empty() for name in present}


def table_file(table: str, shard: int) -> str:
    return f"{table}/part-{shard:06d}.parquet"


def record_file(shard: int) -> str:
    return f"{COMMITS}/{shard:06d}.json"


def find_commit(directory: Directory, shard: int) -> ShardCommit | None:
    """The record of a shard, or None if it is not committed."""
    name = record_file(shard)
    if not directory.exists(name):
        return None
    return ShardCommit.from_json(directory.read(name), where=f"{directory}/{name}")


def committed(directory: Directory, broken: list[str] | None = None) -> dict[int, ShardCommit]:
    """The records of all committed shards, by shard, in order.

    Raises BacklensError for a record that cannot be read; if `broken` is given, adds the error to it instead.
    """
    names = [f"{COMMITS}/{name}" for name in directory.names(COMMITS) if re.fullmatch(r"\d{6,}\.json", name)]
    contents = directory.read_all(names)
    commits: list[ShardCommit] = []
    for name in names:
        try:
            commits.append(ShardCommit.from_json(contents[name], where=f"{directory}/{name}"))
        except BacklensError as error:
            if broken is None:
                raise
            broken.append(str(error))
    return {commit.shard: commit for commit in sorted(commits, key=lambda commit: commit.shard)}
