"""The output of `backlens run`, `status` and `verify`: progress on standard error, and reports."""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from backlens.cli.console import LogFormat, console, progress_bar, say, say_json
from backlens.printable import human_bytes, human_seconds
from backlens.prompts.prompt import subject_lines
from backlens.store.commit import ShardCommit
from backlens.store.status import RunStatus, run_status, verify

if TYPE_CHECKING:  # `status` and `verify` load no model library
    from backlens.engine.executors.base import ReplicaCounts
    from backlens.engine.plan import RunPlan
    from backlens.engine.run import Report, RunProgress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown_progress(format: LogFormat) -> Iterator["RunProgress"]:
    """Choose the progress for standard error: events, lines, or a bar on a terminal."""
    if format == "json":
        from backlens.engine.run import NoProgress

        yield NoProgress()
        return
    with progress_bar(TextColumn("prompts"), TextColumn("{task.fields[pace]}")) as bar:
        yield PlainProgress() if bar is None else BarProgress(bar)


class BarProgress:
    """A bar that moves with every committed shard."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def planned(self, plan: "RunPlan", already_done: int) -> None:
        self.note(_plan_line(plan, already_done))
        self._pace = _Pace(plan.shards.prompts, already_done)
        self._task = self._bar.add_task("loading", total=plan.shards.prompts, completed=already_done, pace="")

    def started(self, workers: int, devices: str, seconds: float) -> None:
        self.note(_start_line(workers, devices, seconds))
        self._bar.update(self._task, description="projecting")
        self._pace.begin()

    def committed(self, commit: ShardCommit, counts: "ReplicaCounts") -> None:
        self._bar.update(self._task, advance=commit.prompts, pace=self._pace.after(commit, counts))

    def note(self, text: str) -> None:
        self._bar.console.print(text)


class PlainProgress:
    """A line at the start, one every ten seconds, one at the end."""

    def planned(self, plan: "RunPlan", already_done: int) -> None:
        self._pace = _Pace(plan.shards.prompts, already_done)
        self.note(_plan_line(plan, already_done))

    def started(self, workers: int, devices: str, seconds: float) -> None:
        self._pace.begin()
        self._shown_at = time.monotonic()
        self.note(_start_line(workers, devices, seconds))

    def committed(self, commit: ShardCommit, counts: "ReplicaCounts") -> None:
        pace, now = self._pace.after(commit, counts), time.monotonic()
        if not self._pace.left or now - self._shown_at >= SECONDS_BETWEEN_LINES:
            self._shown_at = now
            self.note(f"{self._pace.done:,} of {self._pace.total:,} prompts, {pace}")

    def note(self, text: str) -> None:
        say(text, stderr=True)


class _Pace:
    """The speed of a run, its time left, and its failures and retries so far."""

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.done = done
        self._prompts = self._failures = 0
        self._tokens = 0.0
        self.begin()

    @property
    def left(self) -> int:
        return self.total - self.done

    def begin(self) -> None:
        self._started = time.monotonic()

    def after(self, commit: ShardCommit, counts: "ReplicaCounts") -> str:
        self.done += commit.prompts
        self._prompts += commit.prompts
        self._failures += commit.rows.get("failures", 0)
        self._tokens += commit.stats.get("tokens", 0.0)
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._prompts / seconds
        parts = [f"{rate:,.1f} prompts/s", f"{self._tokens / seconds:,.0f} tokens/s"]
        if self.left:
            parts.append(f"{human_seconds(self.left / rate)} left")
        parts.append(_counted(counts.replicas, "replica"))
        if counts.retries:
            parts.append(_counted(counts.retries, "retry", "retries"))
        if self._failures:
            parts.append(_counted(self._failures, "failure"))
        return ", ".join(parts)


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _plan_line(plan: "RunPlan", already_done: int) -> str:
    wanted = plan.options
    resumed = f"; {already_done:,} of them are done already" if already_done else ""
    return (
        f"{plan.shards.prompts:,} prompts in {plan.shards.shards:,} shards, {len(wanted.layers)} layers, "
        f"modules {', '.join(wanted.modules)}{resumed}"
    )


def _start_line(workers: int, devices: str, seconds: float) -> str:
    copies = "1 copy" if workers == 1 else f"{workers} copies"
    return f"{copies} of the model ready on {devices} after {seconds:.1f} s"


STAGES = {
    "tokenize": "tokenize",
    "model": "forward and backward",
    "factors": "factors (norms, spectra, neurons)",
    "lens": "lens (projection, top-k, ranks)",
    "rows": "rows",
    "tables": "Arrow tables",
    "write": "write Parquet and commit",
}


def print_report(report: "Report") -> None:
    """Print prompts, rows, speed, the time per stage, and what to do next."""
    shown = console()
    none_done = _none_done(report)
    if none_done:
        _print_failures(shown, report)
    if report.prompts:
        shown.print(
            f"{report.prompts:,} prompts in {report.shards:,} shards in {report.seconds:.1f} s "
            f"({report.seconds_to_start:.1f} s to plan and load): {report.prompts_per_second:,.1f} prompts/s"
        )
    else:
        shown.print(f"nothing to do: {report.out} is complete")
    if report.prompts and report.resumed_prompts:
        shown.print(f"{report.resumed_prompts:,} more were done before")
    for line in _troubles(report):
        shown.print(line, soft_wrap=True)
    shown.print(_rows_table(report))
    if report.prompts:
        shown.print(_stages_table(report))
    if none_done:
        return
    if report.rows.get("failures"):
        _print_failures(shown, report)
    shown.print("Next:")
    for command in next_commands(report.out, report.first_done):
        shown.print(f"  {command}", soft_wrap=True)


def _none_done(report: "Report") -> bool:
    """Tell whether every prompt failed: the report then begins with that, and proposes no queries."""
    return bool(report.rows.get("failures")) and not report.rows.get("prompts")


def _print_failures(shown: Console, report: "Report") -> None:
    which = "every prompt failed: " if _none_done(report) else ""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in report.failures.items())
    shown.print(
        f"{which}{report.rows['failures']:,} prompts could not be processed ({kinds}); "
        "the reasons are in the table `failures`:",
        soft_wrap=True,
    )
    command = f'backlens query {shlex.quote(report.out)} --sql "SELECT * FROM failures"'
    shown.print(f"  {command}", soft_wrap=True)


def _troubles(report: "Report") -> Iterator[str]:
    """Say what failed and was repaired, and which prompts lack their subject."""
    counts = report.replicas
    if counts.deaths:
        yield f"workers that died and were replaced: {counts.deaths} ({counts.replicas} at work at the end)"
        yield f"shards that were given out again: {counts.retries}"
    if report.out_of_memory:
        yield (
            f"batches that did not fit into memory and were made smaller: {report.out_of_memory} "
            "(a smaller --batch-tokens saves the time)"
        )
    yield from subject_lines(report.subjects_absent, report.subjects_repeated, report.positions)


def next_commands(out: str, prompt: int) -> tuple[str, str, str]:
    """Return three useful queries for any run; `prompt` is a prompt_id that has rows."""
    out = shlex.quote(out)
    return (
        f"backlens query {out} --prompt {prompt}",
        f'backlens query {out} --sql "SELECT layer, module, avg(target_rank) AS target_rank FROM layers '
        'GROUP BY ALL ORDER BY ALL"',
        f'backlens query {out} --sql "SELECT layer, neuron, count(*) AS prompts, avg(grad_norm) AS grad_norm '
        "FROM neurons WHERE module = 'mlp.down' GROUP BY ALL ORDER BY prompts DESC LIMIT 10\"",
    )


def _rows_table(report: "Report") -> Table:
    table = Table("table", "rows", title=None)
    table.columns[1].justify = "right"
    for name, rows in report.rows.items():
        table.add_row(name, f"{rows:,}")
    return table


def _stages_table(report: "Report") -> Table:
    """Show worker seconds; writing overlaps computing, so their sum can exceed the wall time."""
    table = Table("stage", "seconds", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    known = {label: report.stages[stage] for stage, label in STAGES.items() if stage in report.stages}
    total = sum(known.values()) or 1.0
    for label, seconds in known.items():
        table.add_row(label, f"{seconds:.2f}", f"{seconds / total:.0%}")
    return table


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
    """Compare the files at `out` with their records, and return exit status 1 if one differs."""
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
    yield "size", human_bytes(status.bytes)
    if status.last_commit_at is not None:
        yield "last commit", status.last_commit_at
    if status.prompts_per_second is not None and status.seconds_left is not None:
        yield "rate", f"{status.prompts_per_second:,.2f} prompts/s"
        yield "time left", f"about {human_seconds(status.seconds_left)}"


def _state(status: RunStatus) -> str:
    if status.state == "running" and status.driver is not None:
        return f"running on {status.driver.host} (pid {status.driver.pid}) since {status.driver.since}"
    return "stopped; the same command resumes it" if status.state == "stopped" else "done"
