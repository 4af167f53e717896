"""Look-ups in a run: where a token stands, what a neuron is told, what happened in a prompt, or any SELECT.

    run = Run.open("./run")
    run.by_token(" Paris", limit=20)
    run.by_neuron("35.mlp.down.123", limit=20)
    run.by_prompt(17)
    run.sql("SELECT module, avg(grad_norm) FROM layers GROUP BY module", limit=100)

All of them return Arrow tables and see the shards that were committed when the run was opened.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.atlas.sql import connection, run_select
from pipeline.errors import BacklensError
from pipeline.store.commit import committed
from pipeline.store.files import Directory
from pipeline.store.rundir import RunRecord, load_run
from pipeline.store.vocab import VOCAB_FILE
from schemas.tables import TABLES

SECONDS = 60.0
ID_LISTS = {"top_ids": "top_tokens", "bottom_ids": "bottom_tokens"}

TOKEN_QUERY = """
WITH listed AS (
    SELECT prompt_id, layer, module, expert, neuron, NULL::INTEGER AS position, side, ids, scores
    FROM (
        SELECT *, 'top' AS side, top_ids AS ids, top_scores AS scores FROM neurons
        UNION ALL BY NAME
        SELECT *, 'bottom' AS side, bottom_ids AS ids, bottom_scores AS scores FROM neurons
    )
    WHERE list_has_any(ids, $ids)
    UNION ALL
    SELECT prompt_id, layer, module, expert, NULL::INTEGER AS neuron, position, side, ids, scores
    FROM (
        SELECT *, 'top' AS side, top_ids AS ids, top_scores AS scores FROM tokens
        UNION ALL BY NAME
        SELECT *, 'bottom' AS side, bottom_ids AS ids, bottom_scores AS scores FROM tokens
    )
    WHERE list_has_any(ids, $ids)
), places AS (
    SELECT
        * EXCLUDE (ids, scores),
        unnest(ids) AS token_id,
        unnest(scores) AS score,
        (generate_subscripts(ids, 1) - 1)::INTEGER AS place
    FROM listed
)
SELECT prompt_id, layer, module, expert, neuron, position, side, place, score, prompt
FROM places JOIN prompts USING (prompt_id)
WHERE list_contains($ids, token_id)
ORDER BY place, abs(score) DESC, prompt_id, layer, module, expert, neuron, position, side
LIMIT $limit
"""

NEURON_QUERY = """
SELECT
    prompt_id, expert, grad_norm, main_position, target_score, n.target_rank,
    top_ids, top_scores, bottom_ids, bottom_scores, prompt, target
FROM neurons n JOIN prompts USING (prompt_id)
WHERE layer = $layer AND module = $module AND neuron = $index AND ($expert IS NULL OR expert = $expert)
ORDER BY grad_norm DESC, prompt_id, expert
LIMIT $limit
"""

PROMPT_QUERY = """
SELECT
    layer, module, expert, position, token, input_norm, vjp_norm, target_score, target_rank,
    top_ids, top_scores, bottom_ids, bottom_scores
FROM tokens LEFT JOIN vocab USING (token_id)
WHERE prompt_id = $prompt_id
ORDER BY layer, module, expert, position
LIMIT $limit
"""


@dataclass(frozen=True, slots=True)
class Neuron:
    """A unit by its address: `35.mlp.down.123`, or `35.mlp.down.e3.123` in expert 3."""

    layer: int
    module: str
    index: int
    expert: int | None = None
    """None in a dense block; where there are experts, None means any of them."""


def parse_neuron(text: str) -> Neuron:
    """The neuron that an address names, without a look at any run."""
    match = re.fullmatch(r"(\d+)\.(.+?)(?:\.e(\d+))?\.(\d+)", text.strip())
    if match is None:
        raise BacklensError(
            f"neuron: {text!r} is not an address; write layer.module.index such as 35.mlp.down.123, "
            "or 35.mlp.down.e3.123 for expert 3"
        )
    layer, module, expert, index = match.groups()
    return Neuron(int(layer), module, int(index), None if expert is None else int(expert))


@dataclass(frozen=True, slots=True)
class Run:
    """A run's tables as they were committed at one moment."""

    directory: Directory
    record: RunRecord
    files: Mapping[str, Sequence[str]]
    """By table: where its committed files are."""
    shards: int
    """How many shards are committed."""
    seconds: float = SECONDS
    """How long one query may take."""

    @classmethod
    def open(cls, out: str | Directory, seconds: float = SECONDS) -> "Run":
        """The run in the directory or at the URL `out`."""
        directory = Directory.at(out)
        record = load_run(directory)
        commits = committed(directory)
        files = {
            table: [directory.location(c.files[table].path) for c in commits.values() if table in c.files]
            for table in TABLES
        }
        files["vocab"] = [directory.location(VOCAB_FILE)] if directory.exists(VOCAB_FILE) else []
        return cls(directory, record, files, len(commits), seconds)

    @property
    def note(self) -> str | None:
        """What a reader of results should know: that the run is not complete."""
        planned = self.record.plan.shards
        if self.shards >= planned:
            return None
        return f"{self.directory} is not complete: these are {self.shards} of its {planned} shards"

    def by_token(self, token: str, limit: int = 100) -> pa.Table:
        """The neurons and positions in whose top or bottom lists `token` stands, the most prominent first.

        `neuron` is null in a position's rows and `position` in a neuron's; `place` counts from 0 in its list.
        """
        with self._connection() as opened:
            ids = self._token_ids(opened, token)
            return _select(opened, TOKEN_QUERY, ids=ids, limit=limit)

    def by_neuron(self, neuron: str | Neuron, limit: int = 100) -> pa.Table:
        """What each prompt's gradient says to one neuron, the strongest first."""
        wanted = parse_neuron(neuron) if isinstance(neuron, str) else neuron
        with self._connection() as opened:
            self._check_neuron(opened, wanted)
            rows = _select(
                opened,
                NEURON_QUERY,
                layer=wanted.layer,
                module=wanted.module,
                index=wanted.index,
                expert=wanted.expert,
                limit=limit,
            )
            return _with_texts(opened, rows)

    def prompt(self, prompt_id: int) -> pa.Table:
        """One prompt's row of `prompts`: its text, target and loss among them."""
        with self._connection() as opened:
            found = _select(opened, "FROM prompts WHERE prompt_id = $prompt_id", prompt_id=prompt_id)
            if found.num_rows == 0:
                raise BacklensError(self._missing_prompt(opened, prompt_id))
            return found

    def by_prompt(self, prompt_id: int, limit: int | None = None) -> pa.Table:
        """One prompt's layers, modules and positions, each with the tokens of its projection."""
        self.prompt(prompt_id)
        with self._connection() as opened:
            return _with_texts(opened, _select(opened, PROMPT_QUERY, prompt_id=prompt_id, limit=limit))

    def sql(self, statement: str, limit: int = 1000) -> pa.Table:
        """At most `limit` rows of one SELECT over the tables; nothing else is run."""
        with self._connection() as opened:
            return run_select(opened, statement, limit)

    def _connection(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        return connection(self.directory, self.files, self.seconds)

    def _token_ids(self, opened: duckdb.DuckDBPyConnection, token: str) -> list[int]:
        """All ids with that text: more than one where tokens are parts of a character."""
        found = _select(opened, "SELECT token_id FROM vocab WHERE token = $token", token=token)
        if found.num_rows == 0:
            near = _similar_tokens(opened, token)
            proposal = f"did you mean {' or '.join(map(repr, near))}?" if near else "and nothing is like it"
            raise BacklensError(
                f"token: {token!r} is not one token of this vocabulary (a leading space counts); {proposal}"
            )
        return found.column("token_id").to_pylist()

    def _check_neuron(self, opened: duckdb.DuckDBPyConnection, neuron: Neuron) -> None:
        layers, modules = self._known(opened)
        if modules and neuron.module not in modules:
            near = difflib.get_close_matches(neuron.module, modules, n=1)
            proposal = f"; did you mean {near[0]}?" if near else ""
            raise BacklensError(
                f"neuron: this run has no module {neuron.module!r}; it has {', '.join(modules)}{proposal}"
            )
        if layers and neuron.layer not in layers:
            raise BacklensError(
                f"neuron: the model has no layer {neuron.layer}; it has {min(layers)} to {max(layers)}"
            )

    def _known(self, opened: duckdb.DuckDBPyConnection) -> tuple[Sequence[int], list[str]]:
        """The layers and modules there can be: by the model's facts, else by the rows there are."""
        facts = self.record.model
        if "layers" in facts and "modules" in facts:
            return range(int(facts["layers"])), list(facts["modules"])
        rows = _select(opened, "SELECT DISTINCT layer, module::VARCHAR AS module FROM layers").to_pylist()
        return [row["layer"] for row in rows], sorted({row["module"] for row in rows})

    def _missing_prompt(self, opened: duckdb.DuckDBPyConnection, prompt_id: int) -> str:
        failed = _select(
            opened, "FROM failures WHERE prompt_id = $prompt_id", prompt_id=prompt_id
        ).to_pylist()
        if failed:
            failure = failed[0]
            return (
                f"prompt: {prompt_id} failed ({failure['stage']}, {failure['error']}): {failure['message']}"
            )
        if self.note and 0 <= prompt_id < self.record.plan.prompts:
            return f"prompt: {prompt_id} is not there yet; {self.note}"
        ids = _select(
            opened, "SELECT min(prompt_id) AS first, max(prompt_id) AS last FROM prompts"
        ).to_pylist()[0]
        return f"prompt: this run has no prompt {prompt_id}; it has {ids['first']} to {ids['last']}"


def _select(opened: duckdb.DuckDBPyConnection, query: str, **parameters: Any) -> pa.Table:
    """A query of ours."""
    return opened.sql(query, params=parameters).to_arrow_table()


def _similar_tokens(opened: duckdb.DuckDBPyConnection, token: str) -> list[str]:
    """Up to three tokens that were perhaps meant: the same but for spaces and case, then alike."""
    rows = _select(
        opened,
        """
        SELECT token FROM (SELECT DISTINCT token FROM vocab)
        WHERE lower(trim(token)) = lower(trim($token))
            OR jaro_winkler_similarity(lower(trim(token)), lower(trim($token))) > 0.85
        ORDER BY
            lower(trim(token)) = lower(trim($token)) DESC,
            trim(token) = trim($token) DESC,
            jaro_winkler_similarity(lower(trim(token)), lower(trim($token))) DESC,
            token
        LIMIT 3
        """,
        token=token,
    )
    return rows.column("token").to_pylist()


def _with_texts(opened: duckdb.DuckDBPyConnection, rows: pa.Table) -> pa.Table:
    """The rows with tokens in the place of their ids, in columns named accordingly."""
    lists = {name: rows.column(name).to_pylist() for name in ID_LISTS}
    ids = sorted({i for column in lists.values() for row in column if row is not None for i in row})
    found = _select(opened, "SELECT token_id, token FROM vocab WHERE list_contains($ids, token_id)", ids=ids)
    texts = dict(zip(found.column("token_id").to_pylist(), found.column("token").to_pylist(), strict=True))
    for name, column in lists.items():
        tokens = [None if row is None else [texts.get(i, f"<{i}>") for i in row] for row in column]
        place = rows.column_names.index(name)
        rows = rows.set_column(place, ID_LISTS[name], pa.array(tokens, pa.list_(pa.string())))
    return rows
