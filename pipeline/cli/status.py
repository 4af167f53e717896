"""`backlens status` and `verify`: how far a run is, and whether its files are whole."""

from collections.abc import Iterator
from dataclasses import asdict

from rich.table import Table

from pipeline.cli.durations import duration
from pipeline.cli.terminal import console, say, say_json
from pipeline.store.status import RunStatus, run_status
from pipeline.store.verify import verify


def print_status(out: str, as_json: bool) -> int:
    """Show the run at `out` and return the exit status."""
    status = run_status(out)
    if as_json:
        say_json(asdict(status))
        return 0
    table = Table(show_header=False)
    for name, value in _lines(status):
        table.add_row(name, value)
    console().print(table, soft_wrap=True)
    if status.missing:
        more = f" (and {len(status.missing) - 1:,} more files, see --json)" if len(status.missing) > 1 else ""
        say(f"{status.missing[0]}{more}")
    return 0


def print_verified(out: str, every: bool, as_json: bool) -> int:
    """Compare the files at `out` with their records; the exit status is 1 if one differs."""
    found = verify(out, stop_at_first=not every)
    if as_json:
        say_json(asdict(found))
        return 1 if found.losses else 0
    for line in found.losses:
        say(line)
    if not found.losses:
        rows = ", ".join(f"{table} {count:,}" for table, count in found.rows.items()) or "no rows yet"
        say(
            f"{found.out}: {found.files:,} files of {found.shards:,} shards are as they were written ({rows})"
        )
    return 1 if found.losses else 0


def _lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    yield "sweep" if status.kind == "sweep" else "run", status.out
    yield "state", _state(status)
    yield "shards", f"{status.shards_committed:,} of {status.shards:,}"
    failed = f", {status.prompts_failed:,} failed" if status.prompts_failed else ""
    yield (
        "edits" if status.kind == "sweep" else "prompts",
        f"{status.prompts_done:,} of {status.prompts:,} done{failed}",
    )
    yield "rows", ", ".join(f"{table} {rows:,}" for table, rows in status.rows.items()) or "none yet"
    yield "size", f"{status.bytes / 1e6:,.1f} MB"
    if status.last_commit_at is not None:
        yield "last commit", status.last_commit_at
    if status.prompts_per_second is not None and status.seconds_left is not None:
        yield "rate", f"{status.prompts_per_second:,.2f} prompts/s"
        yield "time left", f"about {duration(status.seconds_left)}"


def _state(status: RunStatus) -> str:
    if status.state == "running" and status.driver is not None:
        return f"running on {status.driver.host} (pid {status.driver.pid}) since {status.driver.since}"
    return "stopped; the same command resumes it" if status.state == "stopped" else "done"
