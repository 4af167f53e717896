"""Look-ups agree with a search through the rows in plain Python, and SQL can do nothing but read."""

import hashlib
import random
import resource
from pathlib import Path
from typing import Any

import duckdb
import pytest

from backlens.atlas.atlas import Atlas
from backlens.atlas.definitions import DEFINITIONS
from backlens.atlas.names import Neuron, parse_neuron
from backlens.atlas.tables import ATLAS_TABLES
from backlens.cli.main import call
from backlens.errors import BacklensError
from backlens.store.commit import commit_shard
from backlens.store.directory import Directory
from backlens.store.tables import TABLES
from tests.store.examples import VOCAB, ExampleRun, arrow, example_run, random_rows, start_run


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ExampleRun:
    return example_run(Directory.at(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> ExampleRun:
    return example_run(Directory.at(tmp_path_factory.mktemp("experts")), experts=True, seed=1)


def texts(ids: list[int] | None) -> list[str] | None:
    return None if ids is None else [VOCAB[i] for i in ids]


def prompt_of(example: ExampleRun, prompt_id: int) -> dict[str, Any]:
    return next(row for row in example.rows["prompts"] if row["prompt_id"] == prompt_id)


def appearances(example: ExampleRun, token_id: int) -> list[dict[str, Any]]:
    """Every place in which a token stands, most prominent first."""
    found = []
    for table in ("neurons", "tokens"):
        for row in example.rows[table]:
            for side in ("top", "bottom"):
                ids = row[f"{side}_ids"] or []
                if token_id in ids:
                    place = ids.index(token_id)
                    keys = {name: row[name] for name in ("prompt_id", "layer", "module", "expert")}
                    found.append(
                        keys
                        | {"neuron": row.get("neuron"), "position": row.get("position"), "side": side}
                        | {"place": place, "score": row[f"{side}_scores"][place]}
                        | {"prompt": prompt_of(example, row["prompt_id"])["prompt"]}
                    )
    return sorted(found, key=prominence)


def prominence(row: dict[str, Any]) -> tuple:
    keys = [row["prompt_id"], row["layer"], row["module"], row["expert"] or 0]
    index = [(value is None, value or 0) for value in (row["neuron"], row["position"])]
    return (row["place"], -abs(row["score"]), *keys, *index, row["side"])


@pytest.mark.parametrize("token_id", range(10))
def test_a_token_is_found_wherever_it_stands(example: ExampleRun, token_id: int):
    found = Atlas(example.out).by_token(VOCAB[token_id], limit=10_000)
    assert found.to_pylist() == appearances(example, token_id)


def test_the_limit_keeps_the_most_prominent(example: ExampleRun):
    found = Atlas(example.out).by_token(" Paris", limit=3)
    assert found.to_pylist() == appearances(example, 1)[:3]


def test_a_token_stands_in_experts_too(with_experts: ExampleRun):
    found = Atlas(with_experts.out).by_token(" Rome", limit=10_000)
    assert found.to_pylist() == appearances(with_experts, 3)


@pytest.mark.parametrize(
    ("token", "proposals"),
    [
        ("Rome", [" Rome"]),
        ("PARIS", [" paris", " Paris", "Paris"]),
        (" Pariss", [" Paris"]),
        ("quoted", ["'quoted'"]),
    ],
)
def test_a_token_that_is_none_gets_its_near_matches(example: ExampleRun, token: str, proposals: list[str]):
    with pytest.raises(BacklensError, match="is not one token of this vocabulary") as refusal:
        Atlas(example.out).by_token(token)
    for proposal in proposals:
        assert repr(proposal) in str(refusal.value)


def test_a_token_like_no_other_is_said_to_be_so(example: ExampleRun):
    with pytest.raises(BacklensError, match="no token is similar"):
        Atlas(example.out).by_token("zzzz")


def told(example: ExampleRun, neuron: Neuron) -> list[dict[str, Any]]:
    """What each prompt tells a neuron, strongest first."""
    rows = [
        row
        for row in example.rows["neurons"]
        if (row["layer"], row["module"], row["neuron"]) == (neuron.layer, neuron.module, neuron.index)
        and neuron.expert in (None, row["expert"])
    ]
    names = ["prompt_id", "expert", "grad_norm", "main_position", "target_score", "target_rank"]
    return [
        {name: row[name] for name in names}
        | {"top_tokens": texts(row["top_ids"]), "top_scores": row["top_scores"]}
        | {"bottom_tokens": texts(row["bottom_ids"]), "bottom_scores": row["bottom_scores"]}
        | {name: prompt_of(example, row["prompt_id"])[name] for name in ("prompt", "target")}
        for row in sorted(rows, key=lambda row: (-row["grad_norm"], row["prompt_id"], row["expert"] or 0))
    ]


@pytest.mark.parametrize("neuron", ["0.mlp.up.0", "1.mlp.down.3", "2.mlp.down.5", "2.mlp.down.5000"])
def test_a_neuron_is_told_what_its_rows_say(example: ExampleRun, neuron: str):
    assert Atlas(example.out).by_neuron(neuron, limit=1000).to_pylist() == told(example, parse_neuron(neuron))


@pytest.mark.parametrize("neuron", ["1.mlp.up.e0.2", "1.mlp.up.e1.2", "1.mlp.up.2"])
def test_a_neuron_is_found_in_one_expert_or_in_any(with_experts: ExampleRun, neuron: str):
    found = Atlas(with_experts.out).by_neuron(neuron, limit=1000).to_pylist()
    assert found == told(with_experts, parse_neuron(neuron))


def test_an_address_is_parsed():
    assert parse_neuron("35.mlp.down.123") == Neuron(35, "mlp.down", 123)
    assert parse_neuron(" 35.mlp.down.e3.123 ") == Neuron(35, "mlp.down", 123, expert=3)


@pytest.mark.parametrize("text", ["", "35", "35.mlp.down", "mlp.down.123", "-1.mlp.down.3", "35..3"])
def test_what_is_no_address_is_refused_with_an_example(text: str):
    with pytest.raises(BacklensError, match=r"is not an address; write .* such as 35\.mlp\.down\.123"):
        parse_neuron(text)


def test_an_unknown_layer_or_module_gets_the_known_ones(example: ExampleRun):
    run = Atlas(example.out)
    with pytest.raises(BacklensError, match="the model has no layer 7; it has 0 to 2"):
        run.by_neuron("7.mlp.down.1")
    with pytest.raises(
        BacklensError, match=r"no module 'mlp.donw'; it has mlp.up, mlp.down; did you mean mlp.down\?"
    ):
        run.by_neuron("1.mlp.donw.1")


def test_a_prompt_shows_each_layer_module_and_position(example: ExampleRun):
    rows = [row for row in example.rows["tokens"] if row["prompt_id"] == 5]
    rows.sort(key=lambda row: (row["layer"], row["module"], row["position"]))
    found = Atlas(example.out).by_prompt(5).to_pylist()
    assert len(found) == len(rows)
    for shown, row in zip(found, rows, strict=True):
        assert {name: row[name] for name in shown if name in row} == {
            name: shown[name] for name in shown if name in row
        }
        assert shown["token"] == VOCAB[row["token_id"]]
        assert shown["top_tokens"] == texts(row["top_ids"])
        assert shown["bottom_tokens"] == texts(row["bottom_ids"])


def test_a_prompt_shows_its_text_and_loss(example: ExampleRun):
    assert Atlas(example.out).prompt(5).to_pylist() == [prompt_of(example, 5)]


def test_a_prompt_that_is_not_there_says_why(tmp_path: Path, example: ExampleRun):
    run = Atlas(example.out)
    with pytest.raises(
        BacklensError, match=r"prompt: 3 failed \(read, missing-field\): prompts.jsonl:4: no field"
    ):
        run.by_prompt(3)
    with pytest.raises(BacklensError, match="has no prompt 99; it has 0 to 7"):
        run.by_prompt(99)
    unfinished = example_run(Directory.at(tmp_path), committed=1)
    with pytest.raises(
        BacklensError, match=r"7 is not there yet; .* not complete: these are 1 of its 2 shards"
    ):
        Atlas(unfinished.out).by_prompt(7)


def test_a_run_in_progress_shows_its_committed_shards_and_says_so(tmp_path: Path):
    example = example_run(Directory.at(tmp_path), shards=3, committed=2)
    (tmp_path / "neurons" / "part-000002.parquet").write_bytes(b"not committed")
    run = Atlas(example.out)
    assert run.note is not None
    assert run.by_token(" Paris", limit=10_000).to_pylist() == appearances(example, 1)
    assert run.sql("SELECT count(*) AS n FROM neurons").to_pylist() == [{"n": len(example.rows["neurons"])}]
    commit_shard(
        run.snapshot.directory,
        2,
        arrow(random_rows(random.Random(5), range(8, 12))),
        first_prompt=8,
        prompts=4,
    )
    assert Atlas(example.out).note is None


def test_a_run_without_any_shard_has_empty_tables(tmp_path: Path):
    start_run(Directory.at(tmp_path))
    run = Atlas(str(tmp_path))
    assert run.by_token(" Paris").num_rows == 0
    assert run.by_neuron("0.mlp.up.1").num_rows == 0
    assert run.sql("SELECT * FROM factors").num_rows == 0
    with pytest.raises(BacklensError, match="0 is not there yet"):
        run.by_prompt(0)


def test_what_is_not_a_run_is_refused(tmp_path: Path):
    with pytest.raises(BacklensError, match="is not a run directory"):
        Atlas(str(tmp_path))


def test_runs_on_object_stores_are_read_in_place(tmp_path: Path):
    example = example_run(Directory.at(f"memory://{tmp_path.name}"))
    run = Atlas(f"memory://{tmp_path.name}")
    assert run.by_token(" Paris", limit=10_000).to_pylist() == appearances(example, 1)
    assert run.sql("SELECT count(*) AS n FROM tokens").to_pylist() == [{"n": len(example.rows["tokens"])}]


def test_sql_reads_every_table(example: ExampleRun):
    run = Atlas(example.out)
    for table, rows in example.rows.items():
        assert run.sql(f"SELECT count(*) AS n FROM {table}").to_pylist() == [{"n": len(rows)}]
    joined = run.sql(
        "SELECT token FROM vocab v JOIN prompts p ON v.token_id = p.predicted_id ORDER BY prompt_id"
    )
    predicted = sorted(example.rows["prompts"], key=lambda row: row["prompt_id"])
    assert joined.column("token").to_pylist() == [VOCAB[row["predicted_id"]] for row in predicted]


@pytest.mark.parametrize(
    "statement",
    [
        "FROM vocab",
        "DESCRIBE neurons",
        "SHOW TABLES",
        "VALUES (1), (2)",
        "SUMMARIZE failures",
        "SELECT 1; -- done",
        "FROM layers PIVOT (avg(grad_norm) FOR module IN ('mlp.up', 'mlp.down'))",
        "WITH RECURSIVE r AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM r WHERE x < 5) SELECT * FROM r",
        "SELECT list_transform(top_ids, lambda i: i + 1), [s * 2 FOR s IN top_scores IF s > 0] FROM neurons",
        "SELECT *, row_number() OVER (PARTITION BY layer ORDER BY grad_norm) AS r FROM layers QUALIFY r = 1",
        "SELECT COLUMNS('.*_id') FROM neurons ANTI JOIN failures USING (prompt_id)",
        "SELECT layer, max_by(module, grad_norm) FROM layers GROUP BY ALL HAVING count(*) > 1 ORDER BY ALL",
        "SELECT 'it''s' AS \"COPY\", {'a': 1, 'b': [NULL]}, DATE '2024-01-01' - INTERVAL 1 DAY",
        "SELECT * EXCLUDE (meta) REPLACE (upper(prompt) AS prompt) FROM prompts TABLESAMPLE 100%",
        "(SELECT 1) UNION ALL BY NAME (SELECT 2)",
    ],
)
def test_whatever_only_reads_is_run(example: ExampleRun, statement: str):
    """As DuckDB itself runs it on views of the same rows."""
    run = Atlas(example.out)
    plain = duckdb.connect()
    for table, files in run.snapshot.files.items():
        if files:
            plain.read_parquet(list(files)).create_view(table)
        else:
            plain.register("no_rows", TABLES[table].empty())
            plain.execute(f"CREATE TABLE {table} AS FROM no_rows")
            plain.unregister("no_rows")
    plain.execute("CREATE TABLE lens AS SELECT 0.0::DOUBLE AS norm_floor")
    for table, definition in DEFINITIONS.items():
        plain.execute(f"CREATE VIEW {table} AS {definition}")
    plain.register("neuron_weights", ATLAS_TABLES["neuron_weights"].empty())
    expected = plain.sql(statement.partition(";")[0]).to_arrow_table().to_pylist()
    found = run.sql(statement, limit=10_000).to_pylist()
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert run.sql(statement, limit=1).num_rows == 1


def test_the_order_of_rows_survives_the_limit(example: ExampleRun):
    norms = sorted((row["grad_norm"] for row in example.rows["neurons"]), reverse=True)
    found = Atlas(example.out).sql("SELECT grad_norm FROM neurons ORDER BY grad_norm DESC", limit=7)
    assert found.column("grad_norm").to_pylist() == norms[:7]


def hostile(out: str) -> list[str]:
    data = f"{out}/layers/part-000000.parquet"
    copy = f"COPY (SELECT 1 AS a) TO '{data}' (USE_TMP_FILE false)"
    hidden = f"WITH w AS ({copy}) SELECT * FROM w"
    ((tree,),) = duckdb.execute("SELECT json_serialize_sql($1)", [hidden]).fetchall()
    return [
        copy,
        f"COPY layers TO '{out}/stolen.parquet'",
        f"WITH w AS ({copy}) SELECT * FROM w",
        f"WITH w AS MATERIALIZED ({copy}) FROM w",
        f"SELECT * FROM (WITH w AS ({copy}) SELECT * FROM w)",
        f"SELECT 1 UNION ALL (WITH w AS ({copy}) SELECT * FROM w)",
        f"SELECT (WITH w AS ({copy}) SELECT a FROM w)",
        f"DESCRIBE WITH w AS ({copy}) SELECT * FROM w",
        f"EXPLAIN ANALYZE {copy}",
        f"SELECT * FROM query({in_quotes(copy)})",
        f"SELECT * FROM query({in_quotes(hidden)})",
        f"SELECT * FROM json_execute_serialized_sql({in_quotes(tree)})",
        f'SELECT * FROM "JSON_Execute_Serialized_SQL"({in_quotes(tree)})',
        f"SELECT (SELECT Count FROM json_execute_serialized_sql({in_quotes(tree)}))",
        f"WITH w AS (FROM json_execute_serialized_sql({in_quotes(tree)})) FROM layers, w",
        f"SELECT * FROM layers WHERE rank IN (FROM json_execute_serialized_sql({in_quotes(tree)}))",
        f"SELECT * FROM layers ORDER BY (FROM json_execute_serialized_sql({in_quotes(tree)}))",
        f"DESCRIBE FROM json_execute_serialized_sql({in_quotes(tree)})",
        f"SELECT json_execute_serialized_sql({in_quotes(tree)})",
        f"PRAGMA json_execute_serialized_sql({in_quotes(tree)})",
        f"SELECT * FROM enable_logging(storage = 'file', storage_path = '{out}/log')",
        f"SELECT * FROM enable_profiling(save_location = '{data}')",
        f"SELECT 1; {copy}",
        f"SELECT 1) ; {copy} ; SELECT (1",
        f"ATTACH '{out}/new.db'",
        f"EXPORT DATABASE '{out}/export'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA version",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW layers",
        "DELETE FROM layers",
        "WITH w AS (DELETE FROM factors RETURNING *) SELECT * FROM w",
        "CALL pragma_version()",
        "SELECT 1; SELECT 2",
        "",
        "-- nothing",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        f"SELECT * FROM read_csv('{out}/run.json')",
        f"SELECT * FROM glob('{out}/*')",
        "SELECT * FROM 'https://example.com/x.parquet'",
        "SELECT * FROM example",
        f"SELECT {'+'.join('1' * 900)}",
    ]


def in_quotes(statement: str) -> str:
    return "'" + statement.replace("'", "''") + "'"


def snapshot(folder: str) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_hostile_sql_is_refused_in_one_line_and_nothing_is_written(
    example: ExampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = snapshot(example.out)
    run = Atlas(example.out)
    for statement in hostile(example.out):
        with pytest.raises(BacklensError) as refusal:
            run.sql(statement)
        assert "\n" not in str(refusal.value), statement
        assert snapshot(example.out) == before, statement
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_says_what_can_be_run(example: ExampleRun):
    with pytest.raises(
        BacklensError, match="only a single SELECT statement is run here; it can read the tables vocab"
    ):
        Atlas(example.out).sql("DROP VIEW layers")


def test_mistakes_in_sql_are_explained(example: ExampleRun):
    run = Atlas(example.out)
    with pytest.raises(BacklensError, match='query: Binder Error: Referenced column "norm" not found'):
        run.sql("SELECT norm FROM layers")
    with pytest.raises(BacklensError, match='Table with name neuron does not exist! Did you mean "neurons"'):
        run.sql("SELECT * FROM neuron")
    with pytest.raises(BacklensError, match="query: Parser Error: syntax error"):
        run.sql("SELEC 1")


def test_a_query_that_takes_too_long_is_stopped(example: ExampleRun):
    with pytest.raises(BacklensError, match=r"query: stopped after 0\.3 s"):
        Atlas(example.out, seconds=0.3).sql(
            "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"
        )


def test_a_query_that_needs_too_much_memory_is_stopped_and_writes_nothing(
    example: ExampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BacklensError, match="more memory than the 50MB"):
        Atlas(example.out, memory="50MB").sql("SELECT count(DISTINCT hash(range)) FROM range(50000000)")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path):
    example = example_run(Directory.at(tmp_path))
    (tmp_path / "neurons" / "part-000001.parquet").unlink()
    with pytest.raises(BacklensError, match=r"part-000001\.parquet"):
        Atlas(example.out).by_token(" Paris")


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT count(DISTINCT a) FROM (SELECT unnest(range(20000000)) AS a)",
        "SELECT len(range(600000000))",  # 5 GB of vectors, which DuckDB's own limit does not count
    ],
)
def test_a_query_on_the_command_line_has_a_limit_on_memory(
    example: ExampleRun, statement: str, capsys: pytest.CaptureFixture[str]
):
    before = resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert call(["query", example.out, "--memory", "200MB", "--sql", statement]) == 2
    assert capsys.readouterr().err == (
        "backlens: query: it takes more memory than the 200MB that it is given; narrow it, by layer for example, "
        "or give it more with --memory\n"
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1] < 2 * 2**20  # KiB
    assert resource.getrlimit(resource.RLIMIT_AS) == before[0]
    assert call(["query", example.out, "--memory", "200MB", "--sql", "SELECT 1"]) == 0


@pytest.mark.parametrize("size", ["lots", "4", "-1GB", ""])
def test_a_limit_on_memory_that_is_none_is_refused(
    example: ExampleRun, size: str, capsys: pytest.CaptureFixture[str]
):
    assert call(["query", example.out, f"--memory={size}", "--show", "coverage"]) == 2
    assert capsys.readouterr().err == f"backlens: --memory {size}: write it as 2GB\n"
