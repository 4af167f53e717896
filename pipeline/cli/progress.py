"""Progress of a run: a bar on a terminal, plain lines elsewhere. Both go to standard error."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.cli.durations import duration
from pipeline.cli.logs import LogFormat
from pipeline.cli.terminal import console, say
from pipeline.engine.driver import Progress as ProgressProtocol
from pipeline.engine.events import emit
from pipeline.engine.executors import Standing
from pipeline.engine.plan import RunPlan
from pipeline.store.commit import ShardCommit

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown_progress(format: LogFormat) -> Iterator[ProgressProtocol]:
    """What suits standard error."""
    if format == "json":
        yield NoProgress()
        return
    if not sys.stderr.isatty():
        yield PlainProgress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("prompts"))
    with Progress(*columns, TextColumn("{task.fields[pace]}"), console=console(stderr=True)) as bar:
        yield BarProgress(bar)


class NoProgress:
    """The events of the run say it all."""

    def planned(self, plan: RunPlan, already_done: int) -> None: ...

    def started(self, workers: int, devices: str, seconds: float) -> None: ...

    def committed(self, commit: ShardCommit, standing: Standing) -> None: ...

    def note(self, text: str) -> None:
        emit("note", text=text)


class BarProgress:
    """A bar that moves with every committed shard."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def planned(self, plan: RunPlan, already_done: int) -> None:
        self.note(_plan_line(plan, already_done))
        self._pace = _Pace(plan.shards.prompts, already_done)
        self._task = self._bar.add_task("loading", total=plan.shards.prompts, completed=already_done, pace="")

    def started(self, workers: int, devices: str, seconds: float) -> None:
        self.note(_start_line(workers, devices, seconds))
        self._bar.update(self._task, description="projecting")
        self._pace.begin()

    def committed(self, commit: ShardCommit, standing: Standing) -> None:
        self._bar.update(self._task, advance=commit.prompts, pace=self._pace.after(commit, standing))

    def note(self, text: str) -> None:
        self._bar.console.print(text)


class PlainProgress:
    """A line at the start, one every ten seconds, one at the end."""

    def planned(self, plan: RunPlan, already_done: int) -> None:
        self._pace = _Pace(plan.shards.prompts, already_done)
        self.note(_plan_line(plan, already_done))

    def started(self, workers: int, devices: str, seconds: float) -> None:
        self._pace.begin()
        self._shown_at = time.monotonic()
        self.note(_start_line(workers, devices, seconds))

    def committed(self, commit: ShardCommit, standing: Standing) -> None:
        pace, now = self._pace.after(commit, standing), time.monotonic()
        if not self._pace.left or now - self._shown_at >= SECONDS_BETWEEN_LINES:
            self._shown_at = now
            self.note(f"{self._pace.done:,} of {self._pace.total:,} prompts, {pace}")

    def note(self, text: str) -> None:
        say(text, stderr=True)


class _Pace:
    """How fast a run goes, how long it will take, and what has gone wrong so far."""

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

    def after(self, commit: ShardCommit, standing: Standing) -> str:
        self.done += commit.prompts
        self._prompts += commit.prompts
        self._failures += commit.rows.get("failures", 0)
        self._tokens += commit.stats.get("tokens", 0.0)
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._prompts / seconds
        parts = [f"{rate:,.1f} prompts/s", f"{self._tokens / seconds:,.0f} tokens/s"]
        if self.left:
            parts.append(f"{duration(self.left / rate)} left")
        parts.append(_counted(standing.replicas, "replica"))
        if standing.retries:
            parts.append(_counted(standing.retries, "retry", "retries"))
        if self._failures:
            parts.append(_counted(self._failures, "failure"))
        return ", ".join(parts)


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _plan_line(plan: RunPlan, already_done: int) -> str:
    wanted = plan.wanted
    resumed = f"; {already_done:,} of them are done already" if already_done else ""
    return (
        f"{plan.shards.prompts:,} prompts in {plan.shards.shards:,} shards, {len(wanted.layers)} layers, "
        f"modules {', '.join(wanted.modules)}{resumed}"
    )


def _start_line(workers: int, devices: str, seconds: float) -> str:
    copies = "1 copy" if workers == 1 else f"{workers} copies"
    return f"{copies} of the model ready on {devices} after {seconds:.1f} s"
