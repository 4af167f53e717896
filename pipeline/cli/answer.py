"""`backlens query`: one question, answered as a table, JSON lines or CSV."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
from rich.table import Table

from pipeline.atlas.address import Neuron, parse_neuron
from pipeline.atlas.answer import Answer
from pipeline.atlas.atlas import Atlas
from pipeline.atlas.database import MEMORY_LIMIT, TooLarge
from pipeline.atlas.text import cell_text, shown_columns, visible
from pipeline.cli.bounded import bounded_memory, bytes_of
from pipeline.cli.terminal import WIDE, console, say, say_json
from pipeline.errors import BacklensError, nearest
from pipeline.plain import json_text

Style = Literal["table", "json", "csv"]
ROWS = 20
"""Of a table, where no --limit is given; JSON and CSV have all."""
BATCH = 8192


@dataclass(frozen=True, slots=True)
class Question:
    """The options of `backlens query`."""

    token: str | None = None
    neuron: str | None = None
    prompt: int | None = None
    sql: str | None = None
    show: str | None = None
    compare: str | None = None
    by: str = "relation"
    layer: int | None = None
    module: str | None = None
    position: int | None = None
    min_prompts: int = 5
    limit: int | None = None
    memory: str = MEMORY_LIMIT


SHOWS = {
    "token": ("places", "neurons", "layers"),
    "neuron": ("prompts", "tokens", "summary", "similar"),
    "prompt": ("positions", "neurons", "ranks", "tokens"),
    "run": ("specific", "tokens", "curves", "groups", "coverage"),
}
"""What `--show` can ask of each kind of thing; the first is what is shown without it."""


def print_answer(out: str, question: Question, style: Style) -> int:
    """Answer the one question that is asked and return the exit status."""
    kind = _kind(question)
    if style == "table" and question.limit is None:
        question = replace(question, limit=ROWS)
    bytes_of(question.memory)
    atlas = Atlas(out, memory=question.memory)
    if atlas.note:
        say(atlas.note, stderr=True)
    show = _show(question, kind)
    try:
        answer = _answer(atlas, question, kind, show)  # first, so that nothing is printed before a refusal
    except TooLarge as error:
        raise BacklensError(f"{error}, or give it more with --memory") from error
    if style == "table" and kind == "prompt" and question.prompt is not None:
        _print_prompt(atlas.prompt(question.prompt).to_pylist()[0])
        if question.compare is not None:
            _print_prompt(atlas.prompt(_prompt_number(question.compare)).to_pylist()[0])
    _print(answer, style)
    if style == "table" and _is_of_neurons(kind, show):
        say(atlas.cut_off)
    if style == "table" and show == "summary" and atlas.weights_note:
        say(atlas.weights_note)
    return 0


def _kind(question: Question) -> str:
    """What is asked about: a token, a neuron, a prompt, SQL's tables, or the run."""
    asked = {
        "--token": question.token,
        "--neuron": question.neuron,
        "--prompt": question.prompt,
        "--sql": question.sql,
    }
    named = [flag for flag, value in asked.items() if value is not None]
    of_run = not named and (question.show is not None or question.compare is not None)
    if len(named) != 1 and not of_run:
        found = " and ".join(named) or "none of them"
        raise BacklensError(
            f"query: give exactly one of {', '.join(asked)} (given: {found}), or of the whole run --show "
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


def _show(question: Question, kind: str) -> str:
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


def _answer(atlas: Atlas, question: Question, kind: str, show: str) -> Answer:
    within = {"limit": question.limit, "layer": question.layer, "module": question.module}
    if question.sql is not None:
        with bounded_memory(question.memory):
            return atlas.sql(question.sql, question.limit, as_text=True)
    if question.token is not None:
        return _of_token(atlas, question.token, show, within)
    if question.neuron is not None:
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


def _of_token(atlas: Atlas, token: str, show: str, within: dict[str, Any]) -> Answer:
    if show == "neurons":
        return atlas.token_neurons(token, **within)
    return atlas.token_layers(token, **within) if show == "layers" else atlas.by_token(token, **within)


def _refuse_contradiction(question: Question, neuron: Neuron) -> None:
    """The address says where the neuron is; an option that says otherwise would be ignored."""
    said = (("layer", question.layer, neuron.layer), ("module", question.module, neuron.module))
    for flag, given, own in said:
        if given is not None and given != own:
            raise BacklensError(
                f"--{flag} {given}: --neuron {question.neuron} is in {flag} {own}; leave one out"
            )


def _of_neuron(atlas: Atlas, neuron: str, show: str, limit: int | None) -> Answer:
    if show == "tokens":
        return atlas.neuron_tokens(neuron, limit)
    if show == "summary":
        return atlas.neuron_summary(neuron, limit)
    return atlas.similar_neurons(neuron, limit) if show == "similar" else atlas.by_neuron(neuron, limit)


def _of_prompt(atlas: Atlas, question: Question, prompt: int, show: str, within: dict[str, Any]) -> Answer:
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
    """Whether an answer is about neurons, of which only the strongest are there."""
    return kind == "neuron" or show in ("neurons", "layers", "specific") or (kind, show) == ("run", "tokens")


def _print(answer: Answer, style: Style) -> None:
    if style == "json":
        for batch in answer.table.to_batches(max_chunksize=BATCH):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                say_json(row)
    elif style == "csv":
        _print_csv(answer.table)
    else:
        _print_table(answer)


def _print_csv(answer: pa.Table) -> None:
    """In UTF-8, as it is in the tables; on a terminal, with its control characters escaped."""
    written = BytesIO() if sys.stdout.isatty() else sys.stdout.buffer
    flat = pa.schema([(field.name, _in_one_cell(field.type)) for field in answer.schema])
    with pyarrow.csv.CSVWriter(written, flat) as writer:
        for batch in answer.to_batches(max_chunksize=BATCH):
            columns = list(_flattened(batch))
            writer.write_batch(pa.record_batch(columns, flat))
    if isinstance(written, BytesIO):
        say(written.getvalue().decode(), end="")


def _in_one_cell(of: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_nested(of) or pa.types.is_dictionary(of) else of


def _flattened(batch: pa.RecordBatch) -> Iterator[pa.Array]:
    """The columns, those of lists and structs as JSON."""
    for column in batch.columns:
        if pa.types.is_nested(column.type):
            values = column.to_pylist(maps_as_pydicts="strict")
            yield pa.array([None if value is None else json_text(value) for value in values], pa.string())
        else:
            yield column.cast(_in_one_cell(column.type))


def _print_table(answer: Answer) -> None:
    names = shown_columns(answer.table)
    table = Table(*names)
    for column in table.columns:
        column.overflow = "fold"
    for row in answer.table.select(names).to_pylist():
        table.add_row(*(cell_text(value) for value in row.values()))
    console(wide=WIDE).print(table)
    rows, total = answer.table.num_rows, answer.total
    say(f"{rows:,} rows" if rows >= total else f"{rows:,} of {total:,} rows (--limit)")


def _print_prompt(row: dict[str, Any]) -> None:
    say(f"prompt {row['prompt_id']}: {visible(row['prompt'])} → {visible(row['target'])}")
    say(
        f"loss {row['loss']:.3f}, target probability {row['target_prob']:.3g}, target rank {row['target_rank']}"
    )
