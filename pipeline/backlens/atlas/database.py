"""The SELECTs that define the atlas tables over a run's tables and over each other.

Without a current atlas a connection has them as views; `backlens atlas` writes what they select to files. So a
question reads the same with and without an atlas, and its answer is the same. Only `neuron_weights` is not here:
it comes from the model. They read a table `lens` of one row besides, which holds the run's `norm_floor`.

A run's tables in DuckDB: its files as views, nothing else within reach, and limits on memory and time.

One that is opened once answers many questions of ours, several at a time: each has a cursor of its own, and all share
the memory and what is known of the files. What a stranger writes gets one that is thrown away (`connection`).
A table of which a file is missing or damaged stops only the questions that read it.
"""

import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import duckdb

from backlens.atlas.evidence import TOLD, base, enough, evidence, log_odds
from backlens.atlas.manifest import find_loss
from backlens.atlas.tables import ATLAS_TABLES
from backlens.errors import BacklensError
from backlens.store.directory import Directory
from backlens.store.tables import TABLES, Table

PLACES = 5
"""How many prompts, or neurons, a summary names."""
TOKENS = 10
"""How many tokens a neuron's summary names on each side."""


def _listed(side: str) -> str:
    return f"""
    SELECT
        layer, module, expert, neuron, prompt_id, '{side}' AS side,
        (generate_subscripts({side}_ids, 1) - 1)::SMALLINT AS place,
        unnest({side}_ids) AS token_id, unnest({side}_scores) AS score, grad_norm
    FROM neurons
    """


NEURON_TOPK = f"""
SELECT layer, module, expert, neuron, prompt_id, side, place, token_id, score, grad_norm
FROM ({_listed("top")} UNION ALL {_listed("bottom")})
"""

TOKEN_TOPK = """
SELECT token_id, layer, module, expert, neuron, prompt_id, side, place, score, grad_norm FROM neuron_topk
"""


def _positions(side: str) -> str:
    return f"""
    SELECT
        unnest({side}_ids) AS token_id, layer, module, expert, prompt_id, position, '{side}' AS side,
        (generate_subscripts({side}_ids, 1) - 1)::SMALLINT AS place, unnest({side}_scores) AS score
    FROM tokens
    """


POSITION_TOPK = f"{_positions('top')} UNION ALL {_positions('bottom')}"

NEURON_PROMPTS = """
SELECT layer, module, expert, neuron, prompt_id, grad_norm, main_position, target_score, target_rank
FROM neurons
"""


def _spoken(side: str, name: str) -> str:
    """The columns of one side of `neuron_summary`."""
    first = f"FILTER (side = '{side}' AND nth <= {TOKENS})"
    own = f"FILTER (side = '{side}' AND is_own AND own_nth <= {TOKENS})"
    whole = f"FILTER (side = '{side}')"
    return f"""
        list(token_id ORDER BY nth) {first} AS {name}_ids,
        list(entries ORDER BY nth) {first} AS {name}_counts,
        list(share / base ORDER BY nth) {first} AS {name}_lifts,
        list(token_id ORDER BY own_nth) {own} AS {name}_own_ids,
        list(entries ORDER BY own_nth) {own} AS {name}_own_counts,
        list(log_odds ORDER BY own_nth) {own} AS {name}_own_log_odds,
        abs(sum(share * log2(share)) {whole}) AS {name}_entropy
    """


NEURON_SUMMARY = f"""
WITH ordered AS (
    SELECT *, row_number() OVER (
        PARTITION BY layer, module, expert, neuron ORDER BY grad_norm DESC, prompt_id
    ) AS nth
    FROM neuron_prompts
), kept AS (
    SELECT
        layer, module, expert, neuron,
        count(*) AS prompts,
        sum(grad_norm::DOUBLE) AS grad_norm_sum,
        avg(grad_norm::DOUBLE) AS grad_norm_mean,
        max(grad_norm) AS grad_norm_max,
        list(prompt_id ORDER BY nth) FILTER (nth <= {PLACES}) AS strongest_prompts,
        list(grad_norm ORDER BY nth) FILTER (nth <= {PLACES}) AS strongest_norms
    FROM ordered GROUP BY layer, module, expert, neuron
), counted AS (
    SELECT layer, module, expert, neuron, side, token_id, count(*) AS entries
    FROM neuron_topk WHERE {TOLD} GROUP BY layer, module, expert, neuron, side, token_id
), heard AS (
    SELECT layer, module, expert, neuron, count(*) AS lists
    FROM neuron_topk WHERE {TOLD} AND side = 'top' AND place = 0 GROUP BY layer, module, expert, neuron
), units AS (
    SELECT layer, module, sum(lists) AS unit_lists, count(*) AS unit_neurons FROM heard GROUP BY layer, module
), bases AS (
    SELECT
        layer, module, side, token_id,
        entries / sum(entries) OVER (PARTITION BY layer, module, side) AS base,
        {base("entries", "unit_lists")} AS list_base,
        {enough("unit_neurons * count(*) OVER (PARTITION BY layer, module)")} AS enough
    FROM (
        SELECT layer, module, side, token_id, sum(entries) AS entries
        FROM counted GROUP BY layer, module, side, token_id
    ) JOIN units USING (layer, module)
), compared AS (
    SELECT
        counted.*, lists, base, {log_odds("entries", "lists", "list_base")} AS log_odds,
        {evidence("entries", "lists", "list_base")} >= enough AS is_own
    FROM counted JOIN bases USING (layer, module, side, token_id)
    JOIN heard
    ON counted.layer = heard.layer AND counted.module = heard.module AND counted.neuron = heard.neuron
        AND counted.expert IS NOT DISTINCT FROM heard.expert
), shares AS (
    SELECT
        *,
        entries / sum(entries) OVER (PARTITION BY layer, module, expert, neuron, side) AS share,
        row_number() OVER (
            PARTITION BY layer, module, expert, neuron, side ORDER BY entries DESC, token_id
        ) AS nth,
        row_number() OVER (
            PARTITION BY layer, module, expert, neuron, side, is_own ORDER BY log_odds DESC, entries DESC, token_id
        ) AS own_nth
    FROM compared
), spoken AS (
    SELECT
        layer, module, expert, neuron, any_value(lists) AS lists, sqrt(sum(entries * entries)::DOUBLE) AS length,
        {_spoken("bottom", "promoted")}, {_spoken("top", "demoted")}
    FROM shares GROUP BY layer, module, expert, neuron
)
SELECT
    kept.*, coalesce(lists, 0) AS lists, coalesce(length, 0) AS entries_norm,
    spoken.* EXCLUDE (layer, module, expert, neuron, lists, length)
FROM kept LEFT JOIN spoken
ON kept.layer = spoken.layer AND kept.module = spoken.module AND kept.neuron = spoken.neuron
    AND kept.expert IS NOT DISTINCT FROM spoken.expert
"""


def _pushed(side: str, name: str) -> str:
    first = f"FILTER (side = '{side}' AND nth <= {PLACES})"
    return f"""
        list(neuron ORDER BY nth) {first} AS {name}_neurons,
        list(entries ORDER BY nth) {first} AS {name}_counts
    """


TOKEN_SUMMARY = f"""
WITH counted AS (
    SELECT token_id, layer, module, expert, neuron, side, count(*) AS entries
    FROM token_topk WHERE {TOLD} GROUP BY token_id, layer, module, expert, neuron, side
), ordered AS (
    SELECT *, row_number() OVER (
        PARTITION BY token_id, layer, module, expert, side ORDER BY entries DESC, neuron
    ) AS nth
    FROM counted
), summed AS (
    SELECT
        token_id, layer, module, expert,
        coalesce(sum(entries) FILTER (side = 'bottom'), 0)::BIGINT AS promoted,
        coalesce(sum(entries) FILTER (side = 'top'), 0)::BIGINT AS demoted,
        count(DISTINCT neuron) AS neurons,
        {_pushed("bottom", "promoted")}, {_pushed("top", "demoted")}
    FROM ordered GROUP BY token_id, layer, module, expert
), prompted AS (
    SELECT token_id, layer, module, expert, count(DISTINCT prompt_id) AS prompts
    FROM token_topk WHERE {TOLD} GROUP BY token_id, layer, module, expert
)
SELECT summed.*, prompts
FROM summed JOIN prompted
ON summed.token_id = prompted.token_id AND summed.layer = prompted.layer
    AND summed.module = prompted.module AND summed.expert IS NOT DISTINCT FROM prompted.expert
"""

LAYER_CURVES = """
SELECT
    layer, module, expert, position_class,
    count(*) AS positions,
    count(DISTINCT prompt_id) AS prompts,
    avg(input_norm::DOUBLE) AS input_norm,
    avg(vjp_norm::DOUBLE) AS vjp_norm,
    count(*) FILTER (vjp_norm = 0) AS zeros,
    avg(target_rank) AS target_rank,
    median(target_rank) AS target_rank_median,
    CASE WHEN count(first_top) > 0 THEN entropy(first_top) END AS top_entropy,
    CASE WHEN count(first_bottom) > 0 THEN entropy(first_bottom) END AS bottom_entropy
FROM (
    SELECT
        t.* EXCLUDE (top_ids, bottom_ids), top_ids[1] AS first_top, bottom_ids[1] AS first_bottom,
        CASE
            WHEN position = n_tokens - 1 THEN 'last'
            WHEN position = subject_end - 1 THEN 'subject_last'
            WHEN position = subject_start THEN 'subject_first'
            ELSE 'other'
        END AS position_class
    FROM tokens t JOIN (SELECT prompt_id, n_tokens, subject_start, subject_end FROM prompts) USING (prompt_id)
)
GROUP BY layer, module, expert, position_class
"""

DEFINITIONS: dict[str, str] = {
    "neuron_topk": NEURON_TOPK,
    "token_topk": TOKEN_TOPK,
    "position_topk": POSITION_TOPK,
    "neuron_prompts": NEURON_PROMPTS,
    "neuron_summary": NEURON_SUMMARY,
    "token_summary": TOKEN_SUMMARY,
    "layer_curves": LAYER_CURVES,
    "prompt_tokens": "SELECT * FROM tokens",
    "prompt_neurons": "SELECT * FROM neurons",
}
"""By table, each after those it reads."""


MAIN, OTHER = "main", "other"
"""The schemas: the run's tables, and those of the run it is compared with."""
MEMORY_LIMIT = "4GB"
"""What questions may use together; a server gives less."""

Files = Mapping[str, Sequence[str]]
"""Where a run's files are, by table."""


class LiteralPaths:
    """A directory's files under names that DuckDB takes as they stand: it reads `*`, `?` and `[` as patterns.

    On a local disk they go by a link to the directory, for not every name has a spelling that DuckDB does not read
    (a backslash before such a sign, or at the start of a name beside it). The link is gone with this object.
    """

    def __init__(self, directory: Directory) -> None:
        self._root = self._literal = directory.root
        if not re.search(r"[*?\[\\]", directory.root):
            return
        if not directory.is_local:
            self._literal = re.sub(r"([*?\[])", r"[\1]", directory.root)
            return
        try:
            folder = tempfile.mkdtemp(prefix="backlens-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._literal = os.path.join(folder, "run")
            os.symlink(directory.root, self._literal)
        except OSError as error:
            raise BacklensError(
                f"query: {directory} has signs of a pattern in its name and cannot be linked to from "
                f"{tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder that can be written"
            ) from error

    def __call__(self, paths: Sequence[str]) -> list[str]:
        return [self._literal + path.removeprefix(self._root) for path in paths]


class TooLarge(BacklensError):
    """A question takes more memory than it is given."""


class Database:
    """A run's files as views of `main`, those of another run, if there is one, as views of `other`."""

    def __init__(
        self,
        directory: Directory,
        files: Files,
        memory: str = MEMORY_LIMIT,
        other: tuple[Directory, Files] | None = None,
        derived: Sequence[str] = tuple(ATLAS_TABLES),
        is_kept: bool = False,
        norm_floor: float = 0.0,
    ) -> None:
        """`derived` are the tables of the atlas that will be asked for: to bind all takes longer than many a question.

        One that `is_kept` for many questions has the vocabulary in memory, where all of them look up their texts.
        """
        self._runs = {MAIN: (directory, files)} if other is None else {MAIN: (directory, files), OTHER: other}
        self._paths = {schema: LiteralPaths(run) for schema, (run, _) in self._runs.items()}
        self._losses: list[str] = []
        self._memory = memory
        self._opened = duckdb.connect(":memory:", config={"python_enable_replacements": False})
        with self._errors_as_ours():
            for fs in {run.fs for run, _ in self._runs.values() if not run.is_local}:
                self._opened.register_filesystem(fs)
            self._opened.execute(f"CREATE SCHEMA {OTHER}")
            every = [
                path
                for schema, (_, tables) in self._runs.items()
                for paths in tables.values()
                # A remote pattern is looked up under both its names.
                for path in {*paths, *self._paths[schema](paths)}
            ]
            _restrict(self._opened, every, memory)
            for schema, (_, tables) in self._runs.items():
                for name, table in TABLES.items():
                    is_loaded = is_kept and name == "vocab"
                    self._create(schema, name, table, tables.get(name), is_loaded=is_loaded)
            self._opened.execute(lens_table(norm_floor))
            for name in derived:
                self._create(MAIN, name, ATLAS_TABLES[name], files.get(name), DEFINITIONS.get(name))
            self._opened.execute("SET GLOBAL lock_configuration = true")

    def _create(
        self,
        schema: str,
        name: str,
        table: Table,
        paths: Sequence[str] | None,
        definition: str | None = None,
        is_loaded: bool = False,
    ) -> None:
        """A table from its files, or else as it is defined, or else without rows."""
        whole = f"{schema}.{name}"
        if not paths:
            _create_without_files(self._opened, whole, table, definition)
            return
        kind = "TABLE" if is_loaded else "VIEW"
        try:
            self._opened.execute(f"CREATE {kind} {whole} AS FROM {read_parquet(self._paths[schema](paths))}")
        except duckdb.Error:
            directory, _ = self._runs[schema]
            loss = find_loss(directory, {name: paths})
            if loss is None:
                raise
            self._losses.append(loss)
            _create_lost(self._opened, whole, table, loss)

    @contextmanager
    def question(self, seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that may be used for so many seconds. Errors of DuckDB's leave as BacklensError."""
        asked = self._opened.cursor()
        late = threading.Timer(seconds, asked.interrupt)
        late.start()
        try:
            with self._errors_as_ours(seconds):
                yield asked
        finally:
            late.cancel()
            asked.close()

    def close(self) -> None:
        """Questions that are being asked are still answered."""
        self._opened.close()

    @contextmanager
    def _errors_as_ours(self, seconds: float = 0.0) -> Iterator[None]:
        try:
            yield
        except duckdb.InterruptException as error:
            raise BacklensError(
                f"query: stopped after {seconds:g} s; narrow it, by layer for example"
            ) from error
        except (duckdb.OutOfMemoryException, MemoryError) as error:
            raise TooLarge(
                f"query: it takes more memory than the {self._memory} that it is given; "
                "narrow it, by layer for example"
            ) from error
        except duckdb.Error as error:
            raise BacklensError(self._loss_behind(error) or f"query: {first_line(error)}") from error

    def _loss_behind(self, error: duckdb.Error) -> str | None:
        """The lost file that an error comes from, if it comes from one."""
        for loss in self._losses:
            if loss in str(error):
                return loss
        if isinstance(error, duckdb.BinderException | duckdb.ParserException | duckdb.CatalogException):
            return None
        losses = (find_loss(directory, tables) for directory, tables in self._runs.values())
        return next((loss for loss in losses if loss is not None), None)


@contextmanager
def connection(database: Database, seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """The one question that is put to a database."""
    with closing(database), database.question(seconds) as opened:
        yield opened


def _restrict(opened: duckdb.DuckDBPyConnection, paths: Sequence[str], memory: str) -> None:
    opened.execute(f"SET GLOBAL memory_limit = {sql_text(memory)}")
    opened.execute("SET GLOBAL autoload_known_extensions = false")
    opened.execute("SET GLOBAL temp_directory = ''")  # else a large query spills into the working directory
    opened.execute("SET GLOBAL parquet_metadata_cache = true")
    opened.execute(f"SET GLOBAL allowed_paths = {_literal_list(paths)}")
    opened.execute("SET GLOBAL enable_external_access = false")


def _create_without_files(
    opened: duckdb.DuckDBPyConnection, name: str, table: Table, definition: str | None
) -> None:
    if definition is not None:
        opened.execute(f"CREATE VIEW {name} AS {definition}")
        return
    opened.register("nothing", table.empty())  # seen by this cursor alone, so a table is made of it
    opened.execute(f"CREATE TABLE {name} AS FROM nothing")
    opened.unregister("nothing")


def _create_lost(opened: duckdb.DuckDBPyConnection, name: str, table: Table, loss: str) -> None:
    """A view that fails with `loss` as soon as a question needs a row of it, or the number of its rows."""
    opened.register("nothing", table.empty())
    columns = opened.execute("SELECT column_name, column_type FROM (DESCRIBE nothing)").fetchall()
    opened.unregister("nothing")
    failing = f"error({sql_text(loss)})"
    selected = ", ".join(f'{failing}::{kind} AS "{column}"' for column, kind in columns)
    opened.execute(f"CREATE VIEW {name} AS SELECT {selected} FROM range(1) WHERE {failing} IS NULL")


def lens_table(norm_floor: float) -> str:
    """Makes the table `lens`, of one row, that definitions and questions read."""
    return f"CREATE TABLE lens AS SELECT {norm_floor!r}::DOUBLE AS norm_floor"


def read_parquet(paths: Sequence[str]) -> str:
    """The files as they stand in FROM. A folder's name such as `layer=3` is not a column."""
    return f"read_parquet({_literal_list(paths)}, hive_partitioning = false)"


def _literal_list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(sql_text, texts))}]"


def sql_text(text: str) -> str:
    """A string as SQL, where DuckDB takes no parameters: SET and CREATE VIEW."""
    return "'" + text.replace("'", "''") + "'"


def first_line(error: duckdb.Error) -> str:
    """`Binder Error: Referenced column "x" not found …`, and what DuckDB proposes on the second line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(
        lines[:2] if len(lines) > 1 and lines[1].startswith(("Candidate", "Did you")) else lines[:1]
    )
