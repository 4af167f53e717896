"""`backlens atlas` and `backlens query`: build a run's index, and answer one question as a table, JSON lines or CSV."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from backlens.cli.console import console, progress_bar, say, say_json
from backlens.errors import BacklensError, nearest
from backlens.printable import human_bytes, json_text

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.progress import Progress

    from backlens.atlas.atlas import Atlas
    from backlens.atlas.build import BuildOptions, BuildProgress
    from backlens.atlas.manifest import Manifest
    from backlens.atlas.names import Neuron
    from backlens.display import Answer
    from backlens.store.directory import Directory

Style = Literal["table", "json", "csv"]
ROWS = 20
"""Rows of a printed table without --limit; JSON and CSV have all rows."""
BATCH = 8192


@dataclass(frozen=True, slots=True)
class QueryOptions:
    """The options of `backlens query`."""

    token: str | None
    neuron: str | None
    prompt: int | None
    sql: str | None
    show: str | None
    compare: str | None
    by: str
    layer: int | None
    module: str | None
    position: int | None
    min_prompts: int
    limit: int | None
    memory: str


SHOWS = {
    "token": ("places", "neurons", "layers"),
    "neuron": ("prompts", "tokens", "summary", "similar"),
    "prompt": ("positions", "neurons", "ranks", "tokens"),
    "run": ("specific", "tokens", "curves", "groups", "coverage"),
}
"""The values of --show per kind of question; the first one is the default."""


def print_answer(out: str, question: QueryOptions, style: Style) -> int:
    """Print the answer to the one question that the options ask, and return the exit status."""
    kind = _kind(question)
    show = _show(question, kind)
    if question.compare is not None and kind == "prompt":
        _prompt_number(question.compare)
    from backlens.atlas.atlas import Atlas
    from backlens.atlas.database import TooLarge
    from backlens.atlas.untrusted_sql import bytes_of

    if style == "table" and question.limit is None:
        question = replace(question, limit=ROWS)
    bytes_of(question.memory)
    atlas = Atlas(out, memory=question.memory)
    if atlas.note:
        say(atlas.note, stderr=True)
    try:
        answer = _answer(atlas, question, kind, show)  # first, so that nothing is printed before a refusal
    except TooLarge as error:
        raise BacklensError(f"{error}, or give it more with --memory") from error
    if style == "table" and kind == "prompt" and question.prompt is not None:
        _print_prompt(atlas.prompt(question.prompt).to_pylist()[0])
        if question.compare is not None:
            _print_prompt(atlas.prompt(_prompt_number(question.compare)).to_pylist()[0])
    _print_rows(answer, style)
    if style == "table" and _is_of_neurons(kind, show):
        say(atlas.cut_off)
    if style == "table" and show == "summary" and atlas.weights_note:
        say(atlas.weights_note)
    return 0


def _kind(question: QueryOptions) -> str:
    """Return the subject of the question: token, neuron, prompt, sql, or run."""
    subjects = {
        "--token": question.token,
        "--neuron": question.neuron,
        "--prompt": question.prompt,
        "--sql": question.sql,
    }
    named = [flag for flag, value in subjects.items() if value is not None]
    of_run = not named and (question.show is not None or question.compare is not None)
    if len(named) != 1 and not of_run:
        found = " and ".join(named) or "none of them"
        raise BacklensError(
            f"query: give exactly one of {', '.join(subjects)} (given: {found}), or of the whole run --show "
            f"{', '.join(SHOWS['run'])}"
        )
    if question.sql is not None and (question.layer is not None or question.module is not None):
        raise BacklensError("--layer, --module: do not go with --sql; say it in the SELECT")
    if question.limit is not None and question.limit < 1:
        raise BacklensError(f"--limit {question.limit}: give 1 or more")
    kind = "run" if of_run else named[0].removeprefix("--")
    if question.compare is not None and kind not in ("prompt", "run"):
        raise BacklensError(
            f"--compare {question.compare}: compares two prompts (with --prompt) or two runs (without), not a {kind}"
        )
    return kind


def _show(question: QueryOptions, kind: str) -> str:
    if kind == "sql" or question.compare is not None:
        if question.show is not None:
            beside = "--sql" if kind == "sql" else "--compare"
            raise BacklensError(f"--show {question.show}: does not go with {beside}; leave one of them out")
        return kind
    shows = SHOWS[kind]
    if question.show is None:
        return shows[0]
    if question.show not in shows:
        raise BacklensError(
            f"--show {question.show}: of a {kind} there are {', '.join(shows)}{nearest(question.show, shows)}"
        )
    return question.show


def _answer(atlas: "Atlas", question: QueryOptions, kind: str, show: str) -> "Answer":
    within = {"limit": question.limit, "layer": question.layer, "module": question.module}
    if question.sql is not None:
        from backlens.atlas.untrusted_sql import bounded_memory

        with bounded_memory(question.memory):
            return atlas.sql(question.sql, question.limit, as_text=True)
    if question.token is not None:
        return _of_token(atlas, question.token, show, within)
    if question.neuron is not None:
        from backlens.atlas.names import parse_neuron

        _refuse_contradiction(question, parse_neuron(question.neuron))
        return _of_neuron(atlas, question.neuron, show, question.limit)
    if question.prompt is not None:
        return _of_prompt(atlas, question, question.prompt, show, within)
    if question.compare is not None:
        return atlas.compare_runs(question.compare, **within)
    if show == "groups":
        return atlas.groups(question.by, **within)
    if show == "specific":
        return atlas.specific_neurons(min_prompts=question.min_prompts, **within)
    if show == "tokens":
        return atlas.prominent_tokens(None, **within)
    return atlas.coverage(**within) if show == "coverage" else atlas.layer_curves(**within)


def _of_token(atlas: "Atlas", token: str, show: str, within: dict[str, Any]) -> "Answer":
    if show == "neurons":
        return atlas.token_neurons(token, **within)
    return atlas.token_layers(token, **within) if show == "layers" else atlas.by_token(token, **within)


def _refuse_contradiction(question: QueryOptions, neuron: "Neuron") -> None:
    """Refuse a --layer or --module that differs from the neuron's address, which alone counts."""
    said = (("layer", question.layer, neuron.layer), ("module", question.module, neuron.module))
    for flag, given, own in said:
        if given is not None and given != own:
            raise BacklensError(
                f"--{flag} {given}: --neuron {question.neuron} is in {flag} {own}; leave one out"
            )


def _of_neuron(atlas: "Atlas", neuron: str, show: str, limit: int | None) -> "Answer":
    if show == "tokens":
        return atlas.neuron_tokens(neuron, limit)
    if show == "summary":
        return atlas.neuron_summary(neuron, limit)
    return atlas.similar_neurons(neuron, limit) if show == "similar" else atlas.by_neuron(neuron, limit)


def _of_prompt(
    atlas: "Atlas", question: QueryOptions, prompt: int, show: str, within: dict[str, Any]
) -> "Answer":
    if question.compare is not None:
        return atlas.compare_prompts(prompt, _prompt_number(question.compare), **within)
    if show == "neurons":
        return atlas.prompt_neurons(prompt, **within)
    if show == "ranks":
        return atlas.target_ranks(prompt, position=question.position, **within)
    return atlas.prominent_tokens(prompt, **within) if show == "tokens" else atlas.by_prompt(prompt, **within)


def _prompt_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BacklensError(f"--compare {text}: with --prompt this is another prompt's number") from None


def _is_of_neurons(kind: str, show: str) -> bool:
    """Tell whether the answer is about neurons, of which a run keeps only the strongest."""
    return kind == "neuron" or show in ("neurons", "layers", "specific") or (kind, show) == ("run", "tokens")


def _print_rows(answer: "Answer", style: Style) -> None:
    if style == "json":
        for batch in answer.table.to_batches(max_chunksize=BATCH):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                say_json(row)
    elif style == "csv":
        _print_csv(answer.table)
    else:
        _print_table(answer)


def _print_csv(answer: "pa.Table") -> None:
    """Print CSV in UTF-8; on a terminal, with control characters escaped."""
    import pyarrow as pa
    import pyarrow.csv

    written = BytesIO() if sys.stdout.isatty() else sys.stdout.buffer
    flat = pa.schema([(field.name, _in_one_cell(field.type)) for field in answer.schema])
    with pyarrow.csv.CSVWriter(written, flat) as writer:
        for batch in answer.to_batches(max_chunksize=BATCH):
            columns = list(_flattened(batch))
            writer.write_batch(pa.record_batch(columns, flat))
    if isinstance(written, BytesIO):
        say(written.getvalue().decode(), end="")


def _in_one_cell(of: "pa.DataType") -> "pa.DataType":
    import pyarrow as pa

    return pa.string() if pa.types.is_nested(of) or pa.types.is_dictionary(of) else of


def _flattened(batch: "pa.RecordBatch") -> Iterator["pa.Array"]:
    """Yield the columns, with lists and structs as JSON."""
    import pyarrow as pa

    for column in batch.columns:
        if pa.types.is_nested(column.type):
            values = column.to_pylist(maps_as_pydicts="strict")
            yield pa.array([None if value is None else json_text(value) for value in values], pa.string())
        else:
            yield column.cast(_in_one_cell(column.type))


def _print_table(answer: "Answer") -> None:
    from backlens.display import cell_text, shown_columns

    names = shown_columns(answer.table)
    table = Table(*names)
    for column in table.columns:
        column.overflow = "fold"
    for row in answer.table.select(names).to_pylist():
        table.add_row(*(cell_text(value) for value in row.values()))
    console().print(table)
    rows, total = answer.table.num_rows, answer.total
    say(f"{rows:,} rows" if rows >= total else f"{rows:,} of {total:,} rows (--limit)")


def _print_prompt(row: dict[str, Any]) -> None:
    from backlens.display import visible

    say(f"prompt {row['prompt_id']}: {visible(row['prompt'])} → {visible(row['target'])}")
    say(
        f"loss {row['loss']:.3f}, target probability {row['target_prob']:.3g}, target rank {row['target_rank']}"
    )


def print_atlas(out: str, options: "BuildOptions", as_json: bool) -> int:
    """Build the atlas, print its tables, and return the exit status."""
    from backlens.atlas.build import build_atlas
    from backlens.store.directory import Directory

    directory = Directory.at(out)
    with _shown_progress() as progress:
        manifest = build_atlas(directory, progress, options)
    if as_json:
        say(manifest.to_json().decode(), end="")
    else:
        _print_manifest(directory, manifest)
    return 0


@contextmanager
def _shown_progress() -> Iterator["BuildProgress"]:
    """Show a bar on a terminal, and lines elsewhere."""
    from rich.progress import TimeElapsedColumn

    with progress_bar(TimeElapsedColumn()) as bar:
        yield _BuildLines() if bar is None else _BuildBar(bar)


class _BuildBar:
    def __init__(self, bar: "Progress") -> None:
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


def _print_manifest(directory: "Directory", manifest: "Manifest") -> None:
    from backlens.atlas.manifest import ATLAS

    shown = console()
    shown.print(f"{directory}/{ATLAS}: {manifest.shards:,} shards, built in {manifest.seconds:.1f} s")
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
