"""`backlens query`: one question, answered as a table, JSON lines or CSV."""

import json
import sys
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
from rich.console import Console
from rich.table import Table

from pipeline.atlas.address import Neuron, parse_neuron
from pipeline.atlas.answer import Answer
from pipeline.atlas.atlas import Atlas
from pipeline.atlas.database import MEMORY_LIMIT, TooLarge
from pipeline.atlas.text import cell_text, shown_columns, visible
from pipeline.cli.bounded import bounded_memory, bytes_of
from pipeline.errors import BacklensError, nearest

Style = Literal["table", "json", "csv"]


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
    limit: int = 20
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
    bytes_of(question.memory)
    atlas = Atlas(out, memory=question.memory)
    if atlas.note:
        print(atlas.note, file=sys.stderr)
    show = _show(question, kind)
    try:
        answer = _answer(atlas, question, kind, show)  # first, so that nothing is printed before a refusal
    except TooLarge as error:
        raise BacklensError(f"{error}, or give it more with --memory") from error
    if style == "table" and kind == "prompt" and question.prompt is not None:
        _print_prompt(atlas.prompt(question.prompt).to_pylist()[0])
        if question.compare is not None:
            _print_prompt(atlas.prompt(_prompt_number(question.compare)).to_pylist()[0])
    _print(answer.table, style)
    if style == "table" and _is_of_neurons(kind, show):
        print(atlas.cut_off)
    if style == "table" and show == "summary" and atlas.weights_note:
        print(atlas.weights_note)
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
    if question.limit < 1:
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
            return atlas.sql(question.sql, question.limit)
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


def _of_neuron(atlas: Atlas, neuron: str, show: str, limit: int) -> Answer:
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


def _print(answer: pa.Table, style: Style) -> None:
    if style == "json":
        for row in answer.to_pylist():
            print(json.dumps(row, ensure_ascii=False, default=_as_json))
    elif style == "csv":
        flat = [[_cell_text(value) for value in column.to_pylist()] for column in answer.columns]
        pyarrow.csv.write_csv(pa.table(dict(zip(answer.column_names, flat, strict=True))), sys.stdout.buffer)
    else:
        _print_table(answer)


def _print_table(answer: pa.Table) -> None:
    names = shown_columns(answer)
    table = Table(*names)
    for column in table.columns:
        column.overflow = "fold"
    for row in answer.select(names).to_pylist():
        table.add_row(*(cell_text(value) for value in row.values()))
    # Off a terminal there is no width to fit into: a narrow default would fold every cell.
    width = None if sys.stdout.isatty() else 400
    Console(width=width, markup=False, highlight=False).print(table)
    print(f"{answer.num_rows:,} rows")


def _print_prompt(row: dict[str, Any]) -> None:
    print(f"prompt {row['prompt_id']}: {visible(row['prompt'])} → {visible(row['target'])}")
    print(
        f"loss {row['loss']:.3f}, target probability {row['target_prob']:.3g}, target rank {row['target_rank']}"
    )


def _cell_text(value: Any) -> Any:
    return (
        json.dumps(value, ensure_ascii=False, default=_as_json) if isinstance(value, list | dict) else value
    )


def _as_json(value: Any) -> Any:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
