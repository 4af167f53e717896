"""Answered questions: the rows of a table with the Python and the SQL that give them again.

The second half of the file holds the SELECTs that only the explorer needs: search, previous and next, histograms, and
the neurons of two prompts.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from backlens.atlas.database import sql_text
from backlens.atlas.names import Neuron, parse_neuron
from backlens.atlas.questions import THE_NEURON
from backlens.display import Answer
from backlens.errors import BacklensError

Row = Mapping[str, Any]
MOST_OF_ALL = 250_000
"""Rows that a table without a limit may have; more would not fit into the server's memory."""


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """One table of a page."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Row]
    python: str
    """An expression over `atlas`."""
    sql: str
    """A SELECT with the same rows, with token ids where the page has texts."""
    is_cut: bool = False
    """True if there are more rows."""


def ask(
    name: str, method: Callable[..., Answer], question: str, *values: Any, **more: Any
) -> AnsweredQuestion:
    """The answer of a method of `Atlas`. Its SQL is `question`, with the arguments and `more` as parameters."""
    bound = inspect.signature(method).bind(*values)
    spelled = [f"{key}={value!r}" for key, value in list(bound.arguments.items())[1:]]
    subject = [repr(value) for value in list(bound.arguments.values())[:1]]
    python = f"atlas.{method.__name__}({', '.join([*subject, *spelled])})"
    bound.apply_defaults()
    given = more | bound.arguments
    if "neuron" in given:
        given |= neuron_values(parse_neuron(given["neuron"]))
    limit = bound.arguments["limit"]
    bound.arguments["limit"] = _one_more(limit)
    answer = method(*bound.args, **bound.kwargs)
    return _cut(name, answer.table, limit, python, with_values(question, given))


def together(*questions: Callable[[], AnsweredQuestion]) -> list[AnsweredQuestion]:
    """The answers of several questions, asked in parallel: a small question keeps only one core busy."""
    with ThreadPoolExecutor(len(questions)) as threads:
        return [answer.result() for answer in [threads.submit(question) for question in questions]]


def look_up(opened: duckdb.DuckDBPyConnection, name: str, question: str, **given: Any) -> AnsweredQuestion:
    """The answer to one of the SELECTs below; values are bound."""
    statement = with_values(question, given)
    limit = given.get("limit")
    values = given | ({"limit": _one_more(limit)} if "limit" in given else {})
    answer = opened.sql(question, params=values).to_arrow_table()
    return _cut(name, answer, limit, f"atlas.sql({statement!r})", statement)


def _one_more(limit: int | None) -> int:
    """The limit plus one, which shows whether there are more rows."""
    return (MOST_OF_ALL if limit is None else limit) + 1


def _cut(name: str, answer: pa.Table, limit: int | None, python: str, sql: str) -> AnsweredQuestion:
    """The answer cut to the limit. Raises BacklensError if there is none and the answer is too large for a page."""
    if limit is None and answer.num_rows > MOST_OF_ALL:
        raise BacklensError(
            f"{name}: more than {MOST_OF_ALL:,} rows, too many for a page; give limit, or ask in Python or with "
            "`backlens query --json`"
        )
    kept = answer if limit is None else answer.slice(0, limit)
    return AnsweredQuestion(
        name, answer.column_names, kept.to_pylist(), python, sql, kept.num_rows < answer.num_rows
    )


def neuron_values(neuron: Neuron) -> dict[str, Any]:
    """The parts of a neuron's address, by their names in SELECTs."""
    return {
        "layer": neuron.layer,
        "module": neuron.module,
        "index": neuron.index,
        "expert": neuron.expert,
    }


def with_values(question: str, given: Mapping[str, Any]) -> str:
    """A SELECT with its values written in, for people to copy; it is never run here."""
    return re.sub(r"\$(\w+)", lambda match: _literal(given[match[1]]), question).strip()


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return sql_text(value)
    return f"[{', '.join(map(_literal, value))}]" if isinstance(value, list) else str(value)


BINS = 24
"""Bars of a histogram."""

SEARCH_TOKENS = """
WITH found AS (
    SELECT
        token_id, token,
        CASE
            WHEN token = $q THEN 'exact'
            WHEN trim(token) = trim($q) THEN 'spaces'
            WHEN lower(trim(token)) = lower(trim($q)) THEN 'case'
            ELSE 'part'
        END AS match
    FROM vocab
    WHERE contains(lower(token), CASE WHEN trim($q) = '' THEN $q ELSE lower(trim($q)) END)
    ORDER BY
        list_position(['exact', 'spaces', 'case', 'part'], match), length(token), token_id
    LIMIT $limit
), counted AS (
    SELECT
        token_id, sum(promoted)::BIGINT AS promoted, sum(suppressed)::BIGINT AS suppressed,
        count(DISTINCT layer) AS layers
    FROM token_summary WHERE token_id IN (SELECT token_id FROM found)
    GROUP BY token_id
)
SELECT token_id, token, match, promoted, suppressed, layers
FROM found LEFT JOIN counted USING (token_id)
ORDER BY list_position(['exact', 'spaces', 'case', 'part'], match), length(token), token_id
"""

SEARCH_PROMPTS = """
SELECT prompt_id, prompt, target, subject, relation, loss, target_prob, target_rank
FROM prompts
WHERE $q IS NULL OR contains(lower(prompt), lower($q)) OR contains(lower(target), lower($q))
    OR contains(lower(coalesce(relation, '')), lower($q)) OR contains(lower(coalesce(id, '')), lower($q))
ORDER BY prompt_id
LIMIT $limit
"""

NEAR_NEURONS = """
SELECT
    max(neuron) FILTER (neuron < $index) AS previous,
    min(neuron) FILTER (neuron > $index) AS next,
    count(*) AS kept_neurons
FROM neuron_summary
WHERE layer = $layer AND module = $module AND ($expert IS NULL OR expert = $expert)
"""

NEAR_PROMPTS = """
SELECT
    max(prompt_id) FILTER (prompt_id < $prompt_id) AS previous,
    min(prompt_id) FILTER (prompt_id > $prompt_id) AS next
FROM prompts
"""

HISTOGRAM = f"""
WITH norms AS (
    SELECT grad_norm::DOUBLE AS norm, max(grad_norm::DOUBLE) OVER () AS most
    FROM neuron_prompts WHERE {THE_NEURON}
), filled AS (
    SELECT least(floor(norm / most * {BINS}), {BINS - 1})::INTEGER AS bin, count(*) AS prompts, any_value(most) AS most
    FROM norms WHERE most > 0 GROUP BY bin
)
SELECT bin * most / {BINS} AS norm_from, (bin + 1) * most / {BINS} AS norm_to, prompts, bin
FROM filled ORDER BY bin
"""

TOKEN_TEXTS = """
SELECT token_id, token FROM vocab WHERE list_contains($ids, token_id)
"""

COMPARE_NEURONS = """
WITH kept AS (
    SELECT prompt_id, layer, module::VARCHAR AS module, expert, neuron, grad_norm
    FROM prompt_neurons WHERE prompt_id IN ($one, $two) AND ($module IS NULL OR module = $module)
), pairs AS (
    SELECT
        layer, module, expert, neuron,
        max(grad_norm) FILTER (prompt_id = $one) AS grad_norm_1,
        max(grad_norm) FILTER (prompt_id = $two) AS grad_norm_2
    FROM kept GROUP BY layer, module, expert, neuron
), weakest AS (
    SELECT
        layer, module, expert,
        min(grad_norm) FILTER (prompt_id = $one) AS cut_off_1,
        min(grad_norm) FILTER (prompt_id = $two) AS cut_off_2
    FROM kept GROUP BY layer, module, expert
)
SELECT b.layer, b.module, b.expert, b.neuron, grad_norm_1, grad_norm_2, cut_off_1, cut_off_2
FROM pairs b JOIN weakest w
ON b.layer = w.layer AND b.module = w.module AND b.expert IS NOT DISTINCT FROM w.expert
ORDER BY greatest(coalesce(grad_norm_1, 0), coalesce(grad_norm_2, 0)) DESC, b.layer, b.module, b.expert, b.neuron
LIMIT $limit
"""
