"""Progress of a run: a bar on a terminal, plain lines elsewhere. Both go to standard error."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.cli.logs import LogFormat
from pipeline.engine.driver import Progress as ProgressProtocol
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
    with Progress(
        *columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        yield BarProgress(bar)


class NoProgress:
    """The events of the run say it all."""

    def planned(self, plan: RunPlan, already_done: int) -> None: ...

    def started(self, workers: int, devices: str, seconds: float) -> None: ...

    def committed(self, commit: ShardCommit) -> None: ...


class BarProgress:
    """A bar that moves with every committed shard."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._rate = _Rate()

    def planned(self, plan: RunPlan, already_done: int) -> None:
        self._bar.console.print(_plan_line(plan, already_done), markup=False, highlight=False)
        self._task = self._bar.add_task("loading", total=plan.shards.prompts, completed=already_done, rate="")

    def started(self, workers: int, devices: str, seconds: float) -> None:
        self._bar.console.print(_start_line(workers, devices, seconds), markup=False, highlight=False)
        self._bar.update(self._task, description="projecting")
        self._rate = _Rate()

    def committed(self, commit: ShardCommit) -> None:
        self._bar.update(self._task, advance=commit.prompts, rate=self._rate.after(commit))


class PlainProgress:
    """A line at the start, one every ten seconds, one at the end."""

    def planned(self, plan: RunPlan, already_done: int) -> None:
        self._total, self._done = plan.shards.prompts, already_done
        print(_plan_line(plan, already_done), file=sys.stderr, flush=True)

    def started(self, workers: int, devices: str, seconds: float) -> None:
        self._rate = _Rate()
        self._shown_at = time.monotonic()
        print(_start_line(workers, devices, seconds), file=sys.stderr, flush=True)

    def committed(self, commit: ShardCommit) -> None:
        self._done += commit.prompts
        rate = self._rate.after(commit)
        if self._done == self._total or time.monotonic() - self._shown_at >= SECONDS_BETWEEN_LINES:
            self._shown_at = time.monotonic()
            print(f"{self._done:,} of {self._total:,} prompts, {rate}", file=sys.stderr, flush=True)


class _Rate:
    def __init__(self) -> None:
        self._started = time.monotonic()
        self._prompts = 0
        self._tokens = 0.0

    def after(self, commit: ShardCommit) -> str:
        self._prompts += commit.prompts
        self._tokens += commit.stats.get("tokens", 0.0)
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._prompts / seconds:,.1f} prompts/s, {self._tokens / seconds:,.0f} tokens/s"


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
