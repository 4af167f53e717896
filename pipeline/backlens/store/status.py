"""How far a run is, from its directory alone: no model, no cluster, and no word from its driver."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from backlens.store.commit import ShardCommit, committed
from backlens.store.directory import Directory
from backlens.store.lock import Holder, find_holder
from backlens.store.run_record import Kind, count_rows, load_run
from backlens.store.verify import losses

State = Literal["done", "running", "stopped"]

RECENT = 100
"""Commits that the rate is taken over: enough to even out, few enough to follow replicas that come and go."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run as its directory shows it."""

    out: str
    state: State
    """stopped: not done, and nobody at work; the same command resumes it."""
    shards: int
    shards_committed: int
    prompts: int
    prompts_done: int
    """With rows of their own."""
    prompts_failed: int
    """With a row in `failures`."""
    rows: dict[str, int]
    bytes: int
    last_commit_at: str | None
    """ISO 8601, UTC."""
    prompts_per_second: float | None
    """Of the driver at work now; None until it has committed shards at two moments."""
    seconds_left: float | None
    driver: Holder | None
    kind: Kind = "run"
    """Of an edit sweep, prompts are its edits."""
    missing: Sequence[str] = ()
    """Committed files that are not there or have another size, one line each: a copy may be partial."""


def run_status(out: str, now: datetime | None = None) -> RunStatus:
    """Read the run directory at `out`. Raises BacklensError where there is none."""
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
    """Prompts a second over the last commits; the first of them only starts the clock.

    The clock runs to now where that is longer than a commit takes on average: a run that hangs is seen to slow down.
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
