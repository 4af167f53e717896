"""`backlens doctor`: the table of checks; for unknown blocks, their matrices and a description to edit."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.table import Table
from rich.text import Text

from backlens.cli.console import WIDE, console, say, say_json
from backlens.config import RunConfig
from backlens.doctor.checks import Check
from backlens.doctor.examine import Diagnosis, Note, examine
from backlens.models.recognition import SeenBlock
from backlens.printable import printable

COLOURS = {"pass": "green", "FAIL": "bold red", "info": "cyan", "skip": "dim"}


def print_diagnosis(config: RunConfig, as_json: bool) -> int:
    """Examine the model, print the checks, and return the exit status."""
    with _shown_notes() as note:
        diagnosis = examine(config, note)
    if as_json:
        say_json(diagnosis.as_json(), indent=2)
    else:
        _print(diagnosis)
    return 0 if diagnosis.healthy else 1


@contextmanager
def _shown_notes() -> Iterator[Note]:
    """Show notes on standard error: beside a spinner on a terminal, else one line per note."""
    if not sys.stderr.isatty():
        yield lambda text: say(text, stderr=True)
        return
    with console(stderr=True).status("loading the model") as status:
        yield lambda text: status.update(Text(printable(text)))


def _print(diagnosis: Diagnosis) -> None:
    shown = console(wide=WIDE)
    shown.print(f"{diagnosis.model}: {diagnosis.family}, on {diagnosis.device}", soft_wrap=True)
    shown.print(_table(diagnosis.checks))
    if diagnosis.proposed is not None:
        for block in diagnosis.blocks:
            say(_block(block))
        say("\nA description to edit:\n")
        say(diagnosis.proposed.text)
        say(f"Then: backlens doctor --model {diagnosis.model} --anatomy FILE")
    failed = [check.name for check in diagnosis.checks if check.passed is False]
    say(f"failed: {', '.join(failed)}" if failed else "nothing failed")


def _table(checks: tuple[Check, ...]) -> Table:
    table = Table("check", "result", "measured", "at most", "what was measured, and what to do")
    for column in table.columns[2:4]:
        column.justify = "right"
    table.columns[4].overflow = "fold"
    for check in checks:
        remedy = f"\n→ {check.remedy}" if check.remedy and check.status != "pass" else ""
        table.add_row(
            check.name,
            Text(check.status, style=COLOURS[check.status]),
            _number(check.measured),
            _number(check.limit),
            printable(check.detail + remedy),
        )
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.3g}"


def _block(block: SeenBlock) -> str:
    matrices = "".join(f"\n  {matrix.path}: {matrix.shape}" for matrix in block.matrices)
    return f"\n{_layers(block.layers)}:{matrices}"


def _layers(layers: tuple[int, ...]) -> str:
    """Write layers as `layers 0-2, 5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    spans = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'layer' if len(layers) == 1 else 'layers'} {spans}"
