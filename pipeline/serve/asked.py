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
from pipeline.atlas.database import sql_text

Row = Mapping[str, Any]


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


def ask(name: str, method: Callable[..., pa.Table], question: str, *values: Any, **bound_too: Any) -> Asked:
    """The answer of a method of `Atlas`; its SQL is `question`, where `bound_too` stand besides the arguments."""
    bound = inspect.signature(method).bind(*values)
    spelled = [f"{key}={value!r}" for key, value in list(bound.arguments.items())[1:]]
    subject = [repr(value) for value in list(bound.arguments.values())[:1]]
    python = f"atlas.{method.__name__}({', '.join([*subject, *spelled])})"
    answer = method(*values)
    bound.apply_defaults()
    given = bound_too | bound.arguments
    if "neuron" in given:
        given |= neuron_values(parse_neuron(given["neuron"]))
    return Asked(name, answer.column_names, answer.to_pylist(), python, with_values(question, given))


def together(*asking: Callable[[], Asked]) -> list[Asked]:
    """What these ask, at the same time: a small question keeps one core busy and leaves the others."""
    with ThreadPoolExecutor(len(asking)) as threads:
        return [answer.result() for answer in [threads.submit(asks) for asks in asking]]


def look_up(opened: duckdb.DuckDBPyConnection, name: str, question: str, **given: Any) -> Asked:
    """The answer to a SELECT of the explorer's own; values are bound."""
    answer = opened.sql(question, params=given).to_arrow_table()
    statement = with_values(question, given)
    return Asked(name, answer.column_names, answer.to_pylist(), f"atlas.sql({statement!r})", statement)


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
