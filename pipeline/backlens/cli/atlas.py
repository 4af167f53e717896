"""`backlens atlas`: progress on standard error, and what was built."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from backlens.atlas.build import BuildOptions, build_atlas
from backlens.atlas.build import BuildProgress as ProgressProtocol
from backlens.atlas.manifest import ATLAS, Manifest
from backlens.cli.console import WIDE, console, say
from backlens.printable import human_bytes
from backlens.store.directory import Directory


def print_atlas(out: str, options: BuildOptions, as_json: bool) -> int:
    """Build, print what there is now, and return the exit status."""
    directory = Directory.at(out)
    with _shown_progress() as progress:
        manifest = build_atlas(directory, progress, options)
    if as_json:
        say(manifest.to_json().decode(), end="")
    else:
        _print(directory, manifest)
    return 0


@contextmanager
def _shown_progress() -> Iterator[ProgressProtocol]:
    """A bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield _BuildLines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        yield _BuildBar(bar)


class _BuildBar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def planned(self, text: str, pieces: int) -> None:
        self._bar.console.print(text, highlight=False)
        self._task = self._bar.add_task("layers", total=pieces)

    def finished(self, piece: str, pieces: int, kept: bool) -> None:
        self._bar.update(self._task, advance=1, total=pieces, description=piece)


class _BuildLines:
    def planned(self, text: str, pieces: int) -> None:
        self._done = 0
        say(text, stderr=True)

    def finished(self, piece: str, pieces: int, kept: bool) -> None:
        self._done += 1
        before = " (done before)" if kept else ""
        say(f"{self._done} of {pieces} pieces: {piece}{before}", stderr=True)


def _print(directory: Directory, manifest: Manifest) -> None:
    shown = console(wide=WIDE)
    shown.print(f"{directory}/{ATLAS}: of {manifest.shards:,} shards, built in {manifest.seconds:.1f} s")
    table = Table("table", "rows", "size", "files")
    for column in table.columns[1:]:
        column.justify = "right"
    sizes = manifest.sizes
    for name, rows in manifest.rows.items():
        table.add_row(name, f"{rows:,}", human_bytes(sizes[name]), str(len(manifest.files[name])))
    table.add_row("all", f"{sum(manifest.rows.values()):,}", human_bytes(sum(sizes.values())), "")
    shown.print(table)
    shown.print(str(manifest.cut_off))
    shown.print(str(manifest.weights), soft_wrap=True)
    shown.print("Next:")
    out = shlex.quote(str(directory))
    shown.print(f"  backlens query {out} --show specific", soft_wrap=True)
    shown.print(f"  backlens query {out} --show curves --module mlp.down", soft_wrap=True)
