"""The state of a run directory, from its files alone: how far the run is, and whether the files are unchanged.

Sizes are compared first, with one listing per folder: that is quick, and finds what a partial copy lacks. Then contents
are read whole and compared with their checksums. Tables are read here too, from the committed files and no others.
"""

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from backlens.errors import BacklensError
from backlens.store.commit import COMMITS, VOCAB_FILE, ShardCommit, committed, record_file
from backlens.store.directory import Directory
from backlens.store.lock import Holder, find_holder
from backlens.store.parquet import FileRecord, file_checksum
from backlens.store.run_record import Kind, count_rows, find_run, load_run
from backlens.store.tables import TABLES


@dataclass(frozen=True, slots=True)
class Loss:
    """A file that is missing or has changed since it was written."""

    directory: str
    """Directory as the user wrote it."""
    name: str
    """File name, relative to the directory."""
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.directory}/{self.name}: {self.problem}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class Verified:
    """Result of `verify`: how much it compared, and the losses it found."""

    out: str
    shards: int
    files: int
    bytes: int
    rows: dict[str, int]
    losses: Sequence[str]
    """One line each."""


def verify(out: str, stop_at_first: bool = True) -> Verified:
    """Compare every committed file with its record: its size, its checksum and its number of rows."""
    directory = Directory.at(out)
    load_run(directory)
    found: list[str] = []
    commits = committed(directory, broken=found)
    for loss in every_loss(directory, list(commits.values())):
        if found and stop_at_first:
            break
        found.append(str(loss))
    if stop_at_first:
        del found[1:]
    records = [record for commit in commits.values() for record in commit.files.values()]
    size = sum(record.bytes for record in records)
    rows = count_rows(list(commits.values()))
    return Verified(str(directory), len(commits), len(records), size, rows, found)


def every_loss(
    directory: Directory, commits: Sequence[ShardCommit], tables: Sequence[str] | None = None
) -> Iterator[Loss]:
    """Every file that is missing or changed. Sizes are compared first, because that is quick."""
    lost: set[str] = set()
    for loss in losses(directory, commits, tables):
        lost.add(loss.name)
        yield loss
    for commit in commits:
        for table, record in commit.files.items():
            if record.path in lost or (tables is not None and table not in tables):
                continue
            problem = _changed(directory, record)
            if problem is not None:
                yield _loss(directory, record.path, problem, _recompute(directory, commit))


def _changed(directory: Directory, record: FileRecord) -> str | None:
    with directory.open(record.path) as file:
        if file_checksum(file) != record.checksum:
            return "the content is not what was written"
        file.seek(0)
        try:
            rows = pq.read_metadata(file).num_rows
        except pa.ArrowException as error:
            return f"not a Parquet file ({error})"
    return None if rows == record.rows else f"{rows:,} rows, its record says {record.rows:,}"


def losses(
    directory: Directory, commits: Iterable[ShardCommit], tables: Sequence[str] | None = None
) -> Iterator[Loss]:
    """Every file that is missing or has another size, of these tables (None: all, with records and vocabulary)."""
    commits = list(commits)
    if tables is None:
        yield from _lost_records(directory, commits)
    if (tables is None or "vocab" in tables) and (loss := lost_vocab(directory)) is not None:
        yield loss
    remedies = {
        record.path: (record, commit)
        for commit in commits
        for table, record in commit.files.items()
        if tables is None or table in tables
    }
    for path, problem in lost_files(directory, [record for record, _ in remedies.values()]):
        yield _loss(directory, path, problem, _recompute(directory, remedies[path][1]))


def _lost_records(directory: Directory, commits: Sequence[ShardCommit]) -> Iterator[Loss]:
    """The missing records of a run that is done; readers skip the shards of these records."""
    record = find_run(directory)
    if record is None or record.status != "done":
        return
    there = {commit.shard for commit in commits}
    for shard in range(record.plan.shards):
        if shard not in there:
            yield _loss(directory, record_file(shard), "missing", "run the same command again")


def lost_vocab(directory: Directory) -> Loss | None:
    """The loss of the vocabulary's file if it is missing or no Parquet file. No record holds its size."""
    record = find_run(directory)
    if record is None or record.kind != "run" or not directory.names(COMMITS):
        return None
    if not directory.exists(VOCAB_FILE):
        return _loss(directory, VOCAB_FILE, "missing", "run the same command again")
    try:
        with directory.open(VOCAB_FILE) as file:
            pq.read_metadata(file)
    except (pa.ArrowException, OSError, EOFError):
        return _loss(directory, VOCAB_FILE, "not a Parquet file", "delete it and run the same command again")
    return None


def lost_files(directory: Directory, records: Iterable[FileRecord]) -> Iterator[tuple[str, str]]:
    """Path and problem of each file that is missing or has another size than its record says, in order."""
    sizes: dict[str, dict[str, int]] = {}
    for record in records:
        folder, name = posixpath.split(record.path)
        if folder not in sizes:
            sizes[folder] = directory.sizes(folder)
        size = sizes[folder].get(name)
        if size is None:
            yield record.path, "missing"
        elif size != record.bytes:
            yield record.path, f"{size:,} bytes, {record.bytes:,} were written"


def _loss(directory: Directory, path: str, problem: str, remedy: str) -> Loss:
    return Loss(str(directory), path, problem, f"copy it again, or {remedy}")


def _recompute(directory: Directory, commit: ShardCommit) -> str:
    return f"delete {directory}/{record_file(commit.shard)} and run the same command again"


def table_files(directory: Directory, table: str) -> list[str]:
    """The absolute paths or URLs of a table's committed files, in the order of shards."""
    return [directory.location(name) for name in committed_names(directory, table)]


def committed_names(directory: Directory, table: str) -> list[str]:
    """The names of a table's committed files, relative to the run directory, in the order of shards."""
    if table not in TABLES:
        raise BacklensError(f"no table {table!r}; there are {', '.join(TABLES)}")
    if table == "vocab":
        return [VOCAB_FILE] if directory.exists(VOCAB_FILE) else []
    commits = committed(directory).values()
    return [commit.files[table].path for commit in commits if table in commit.files]


def read_table(directory: Directory, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole table in memory, in the order of shards; without rows if no shard is committed.

    Raises BacklensError that names the file where one is missing or changed.
    """
    names = committed_names(directory, table)
    if not names:
        empty = TABLES[table].empty()
        return empty if columns is None else empty.select(list(columns))
    paths = [directory.path(name) for name in names]
    wanted = None if columns is None else list(columns)
    try:
        # `layer=3` in the name of a folder is not a column.
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


State = Literal["done", "running", "stopped"]

RECENT = 100
"""Number of last commits that give the rate: enough for a mean, few enough to follow a change of replicas."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Progress of a run, read from its directory."""

    out: str
    state: State
    """`stopped`: not done, and no process drives it; the same command resumes it."""
    shards: int
    shards_committed: int
    prompts: int
    prompts_done: int
    """Prompts with a row in `prompts` (edits of a sweep: in `edits`)."""
    prompts_failed: int
    """Prompts with a row in `failures`."""
    rows: dict[str, int]
    bytes: int
    last_commit_at: str | None
    """Time of the last commit: ISO 8601, UTC."""
    prompts_per_second: float | None
    """Rate of the current driver; None until it has committed shards at two different times."""
    seconds_left: float | None
    driver: Holder | None
    kind: Kind = "run"
    """`sweep`: the prompts are the edits of a sweep."""
    missing: Sequence[str] = ()
    """Committed files that are missing or have another size, one line each, as in a partial copy."""


def run_status(out: str, now: datetime | None = None) -> RunStatus:
    """The progress of the run in `out`. Raises BacklensError if `out` is not a run directory."""
    directory = Directory.at(out)
    record = load_run(directory)
    holder = find_holder(directory)
    broken: list[str] = []
    commits = list(committed(directory, broken).values())
    rows = count_rows(commits)
    complete = record.status == "done" and len(commits) == record.plan.shards
    rate = None
    if holder is not None and not complete:
        rate = _rate([c for c in commits if c.written_at >= holder.since], now or datetime.now(UTC))
    left = record.plan.prompts - sum(commit.prompts for commit in commits)
    return RunStatus(
        out=str(directory),
        state="done" if complete else "running" if holder is not None else "stopped",
        shards=record.plan.shards,
        shards_committed=len(commits),
        prompts=record.plan.prompts,
        prompts_done=rows.get("edits" if record.kind == "sweep" else "prompts", 0),
        prompts_failed=rows.get("failures", 0),
        rows=rows,
        bytes=sum(file.bytes for commit in commits for file in commit.files.values()),
        last_commit_at=max((commit.written_at for commit in commits), default=None),
        prompts_per_second=rate,
        seconds_left=left / rate if rate else None,
        driver=holder,
        kind=record.kind,
        missing=[*broken, *map(str, losses(directory, commits))],
    )


def _rate(commits: Sequence[ShardCommit], now: datetime) -> float | None:
    """Prompts per second over the last commits; the first of them only gives the start time.

    The time since the last commit counts as far as it is longer than a commit takes on average, so the rate falls when
    a run hangs.
    """
    recent = sorted(commits, key=lambda commit: commit.written_at)[-RECENT:]
    if len(recent) < 2:
        return None
    times = [datetime.fromisoformat(commit.written_at) for commit in recent]
    seconds = (times[-1] - times[0]).total_seconds()
    if not seconds:
        return None
    overdue = (now - times[-1]).total_seconds() - seconds / (len(recent) - 1)
    return sum(commit.prompts for commit in recent[1:]) / (seconds + max(overdue, 0.0))
