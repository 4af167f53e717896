"""What a command prints when it is done."""

import shlex
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from pipeline.cli.terminal import console
from pipeline.engine.driver import Report
from pipeline.prompts.subject import subject_lines

STAGES = {
    "tokenize": "tokenize",
    "model": "forward and backward",
    "factors": "factors (norms, spectra, neurons)",
    "lens": "lens (projection, top-k, ranks)",
    "rows": "rows",
    "tables": "Arrow tables",
    "write": "write Parquet and commit",
}


def print_report(report: Report) -> None:
    """Prompts, rows, speed, where the time went, and what to do next."""
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


def _none_done(report: Report) -> bool:
    """Whether every prompt failed: then there is nothing to ask the run, and that is the first thing to say."""
    return bool(report.rows.get("failures")) and not report.rows.get("prompts")


def _print_failures(shown: Console, report: Report) -> None:
    which = "every prompt failed: " if _none_done(report) else ""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in report.failures.items())
    shown.print(
        f"{which}{report.rows['failures']:,} prompts could not be processed ({kinds}); "
        "the reasons are in the table `failures`:",
        soft_wrap=True,
    )
    command = f'backlens query {shlex.quote(report.out)} --sql "SELECT * FROM failures"'
    shown.print(f"  {command}", soft_wrap=True)


def _troubles(report: Report) -> Iterator[str]:
    """What went wrong and was mended, and what the prompts do not say."""
    standing = report.standing
    if standing.deaths:
        yield f"workers that died and were replaced: {standing.deaths} ({standing.replicas} at work at the end)"
        yield f"shards that were given out again: {standing.retries}"
    if report.out_of_memory:
        yield (
            f"batches that did not fit into memory and were made smaller: {report.out_of_memory} "
            "(a smaller --batch-tokens saves the time)"
        )
    yield from subject_lines(report.subjects_absent, report.subjects_repeated, report.positions)


def next_commands(out: str, prompt: int) -> tuple[str, str, str]:
    """Three questions worth asking of any run; `prompt` is one that it holds."""
    out = shlex.quote(out)
    return (
        f"backlens query {out} --prompt {prompt}",
        f'backlens query {out} --sql "SELECT layer, module, avg(target_rank) AS target_rank FROM layers '
        'GROUP BY ALL ORDER BY ALL"',
        f'backlens query {out} --sql "SELECT layer, neuron, count(*) AS prompts, avg(grad_norm) AS grad_norm '
        "FROM neurons WHERE module = 'mlp.down' GROUP BY ALL ORDER BY prompts DESC LIMIT 10\"",
    )


def _rows_table(report: Report) -> Table:
    table = Table("table", "rows", title=None)
    table.columns[1].justify = "right"
    for name, rows in report.rows.items():
        table.add_row(name, f"{rows:,}")
    return table


def _stages_table(report: Report) -> Table:
    """Worker seconds; writing overlaps computing, so the sum can exceed the wall time."""
    table = Table("stage", "seconds", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    known = {label: report.stages[stage] for stage, label in STAGES.items() if stage in report.stages}
    total = sum(known.values()) or 1.0
    for label, seconds in known.items():
        table.add_row(label, f"{seconds:.2f}", f"{seconds / total:.0%}")
    return table
