"""`backlens query`: one question, answered as a table, JSON lines or CSV."""

import json
import sys
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
from rich.console import Console
from rich.table import Table

from pipeline.atlas.query import Run
from pipeline.errors import BacklensError

Style = Literal["table", "json", "csv"]

SHOWN_IN_LISTS = 5
"""List items that a table cell shows; JSON and CSV have them all."""


def print_answer(
    out: str,
    token: str | None,
    neuron: str | None,
    prompt: int | None,
    sql: str | None,
    limit: int,
    style: Style,
) -> int:
    """Answer the one question that is asked and return the exit status."""
    asked = {"--token": token, "--neuron": neuron, "--prompt": prompt, "--sql": sql}
    named = [flag for flag, value in asked.items() if value is not None]
    if len(named) != 1:
        found = " and ".join(named) or "none of them"
        raise BacklensError(f"query: give exactly one of {', '.join(asked)} (given: {found})")
    if limit < 1:
        raise BacklensError(f"--limit {limit}: give 1 or more")
    run = Run.open(out)
    if run.note:
        print(run.note, file=sys.stderr)
    if token is not None:
        answer = run.by_token(token, limit)
    elif neuron is not None:
        answer = run.by_neuron(neuron, limit)
    elif sql is not None:
        answer = run.sql(sql, limit)
    else:
        assert prompt is not None
        if style == "table":
            _print_prompt(run.prompt(prompt).to_pylist()[0])
        answer = run.by_prompt(prompt, limit)
    _print(answer, style)
    return 0


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
    # A column of nulls (the experts of a dense model) says nothing; where a list of tokens has its texts, they
    # are what a reader looks for, and JSON and CSV have the ids and scores.
    columns = answer.column_names
    sides = [name.removesuffix("_tokens") for name in columns if name.endswith("_tokens")]
    beside = {side + suffix for side in sides for suffix in ("_ids", "_scores")}
    names = [
        name for name in columns if answer[name].null_count < max(answer.num_rows, 1) and name not in beside
    ]
    table = Table(*names)
    for column in table.columns:
        column.overflow = "fold"
    for row in answer.select(names).to_pylist():
        table.add_row(*(_shown(value) for value in row.values()))
    # Off a terminal there is no width to fit into: a narrow default would fold every cell.
    width = None if sys.stdout.isatty() else 400
    Console(width=width, markup=False, highlight=False).print(table)
    print(f"{answer.num_rows:,} rows")


def _print_prompt(row: dict[str, Any]) -> None:
    print(f"prompt {row['prompt_id']}: {visible(row['prompt'])} → {visible(row['target'])}")
    print(
        f"loss {row['loss']:.3f}, target probability {row['target_prob']:.3g}, target rank {row['target_rank']}"
    )


def visible(text: str) -> str:
    """Text on one line, with the spaces at its ends and its line breaks to be seen."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    stripped = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    return "␣" * lead + stripped + "␣" * (len(text) - lead - len(stripped)) if stripped else "␣" * len(text)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        more = " …" if len(value) > SHOWN_IN_LISTS else ""
        return " ".join(_shown(item) for item in value[:SHOWN_IN_LISTS]) + more
    return str(value)


def _cell_text(value: Any) -> Any:
    return (
        json.dumps(value, ensure_ascii=False, default=_as_json) if isinstance(value, list | dict) else value
    )


def _as_json(value: Any) -> Any:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
