"""A question that was put to a run, with its answer and with how anyone can put it again in Python or SQL."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.atlas.address import Neuron, parse_neuron
from pipeline.atlas.answer import Answer
from pipeline.atlas.database import sql_text
from pipeline.errors import BacklensError

Row = Mapping[str, Any]
MOST_OF_ALL = 250_000
"""Rows of a table that has no limit; a server has no room for more."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One table of a page."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Row]
    python: str
    """An expression over `atlas`."""
    sql: str
    """A SELECT with the same rows, by ids where the page has the tokens' texts."""
    is_cut: bool = False
    """Whether there are more rows than these."""


def ask(name: str, method: Callable[..., Answer], question: str, *values: Any, **bound_too: Any) -> Asked:
    """The answer of a method of `Atlas`; its SQL is `question`, where `bound_too` stand besides the arguments."""
    bound = inspect.signature(method).bind(*values)
    spelled = [f"{key}={value!r}" for key, value in list(bound.arguments.items())[1:]]
    subject = [repr(value) for value in list(bound.arguments.values())[:1]]
    python = f"atlas.{method.__name__}({', '.join([*subject, *spelled])})"
    bound.apply_defaults()
    given = bound_too | bound.arguments
    if "neuron" in given:
        given |= neuron_values(parse_neuron(given["neuron"]))
    limit = bound.arguments["limit"]
    bound.arguments["limit"] = _one_more(limit)
    answer = method(*bound.args, **bound.kwargs)
    return _asked(name, answer.table, limit, python, with_values(question, given))


def together(*asking: Callable[[], Asked]) -> list[Asked]:
    """What these ask, at the same time: a small question keeps one core busy and leaves the others."""
    with ThreadPoolExecutor(len(asking)) as threads:
        return [answer.result() for answer in [threads.submit(asks) for asks in asking]]


def look_up(opened: duckdb.DuckDBPyConnection, name: str, question: str, **given: Any) -> Asked:
    """The answer to a SELECT of the explorer's own; values are bound."""
    statement = with_values(question, given)
    limit = given.get("limit")
    asking = given | ({"limit": _one_more(limit)} if "limit" in given else {})
    answer = opened.sql(question, params=asking).to_arrow_table()
    return _asked(name, answer, limit, f"atlas.sql({statement!r})", statement)


def _one_more(limit: int | None) -> int:
    """So many rows show whether there are more than the limit."""
    return (MOST_OF_ALL if limit is None else limit) + 1


def _asked(name: str, answer: pa.Table, limit: int | None, python: str, sql: str) -> Asked:
    """The rows within the limit."""
    if limit is None and answer.num_rows > MOST_OF_ALL:
        raise BacklensError(
            f"{name}: more than {MOST_OF_ALL:,} rows, which is more than a page has room for; give limit, or ask "
            "in Python or with `backlens query --json`"
        )
    kept = answer if limit is None else answer.slice(0, limit)
    return Asked(name, answer.column_names, kept.to_pylist(), python, sql, kept.num_rows < answer.num_rows)


def neuron_values(neuron: Neuron) -> dict[str, Any]:
    """A neuron's address as SELECTs name its parts."""
    return {
        "layer": neuron.layer,
        "module": neuron.module,
        "index": neuron.index,
        "expert": neuron.expert,
    }


def with_values(question: str, given: Mapping[str, Any]) -> str:
    """A SELECT with its values written in, to be read and copied; never to be run here."""
    return re.sub(r"\$(\w+)", lambda match: _literal(given[match[1]]), question).strip()


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return sql_text(value)
    return f"[{', '.join(map(_literal, value))}]" if isinstance(value, list) else str(value)
