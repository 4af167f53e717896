"""What commands print: whole for programs, said where it is cut for people, and never a terminal's master."""

import ast
import csv
import io
import json
import os
import pty
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from pipeline.atlas import Atlas
from pipeline.plain import json_text, plain, printable
from pipeline.store.commit import commit_shard
from pipeline.store.files import Directory
from pipeline.store.rundir import finish
from tests.engine.command import BACKLENS, Finished, called, environment
from tests.store.examples import ExampleRun, arrow, example_run, random_rows, start_run

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202erev \r[bold]b[/bold] [/] :smile: δ😀"


def printed(*arguments: object, encoding: str = "utf-8") -> Finished:
    """A command in a process of its own, whose streams have this encoding; text as any reader of bytes has it."""
    done = subprocess.run(
        [BACKLENS, *map(str, arguments)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=environment() | {"PYTHONIOENCODING": encoding},
        check=False,
    )
    return Finished(done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ExampleRun:
    return example_run(Directory.at(tmp_path_factory.mktemp("run")), shards=4)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with escape sequences, markup and emoji codes wherever a text comes from its input."""
    run = start_run(Directory.at(tmp_path_factory.mktemp("hostile")), prompts=4)
    rows = random_rows(random.Random(0), range(4))
    for row in rows["prompts"]:
        row |= dict.fromkeys(("id", "prompt", "target", "subject", "relation"), HOSTILE)
    rows["failures"][0]["message"] = f"prompts.jsonl:4: {HOSTILE}"
    commit_shard(run.directory, 0, arrow(rows), first_prompt=0, prompts=4)
    finish(run)
    return run.directory.root


def json_lines(text: str) -> list[Any]:
    """Strict JSON, a document a line."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# Programs get everything.


def test_programs_get_every_row_and_people_are_told_of_how_many(example: ExampleRun):
    rows = len(example.rows["tokens"])
    assert rows > 100
    asked = ("query", example.out, "--sql", "FROM tokens")
    assert len(json_lines(called(*asked, "--json").stdout)) == rows
    assert len(list(csv.reader(io.StringIO(printed(*asked, "--csv").stdout)))) == rows + 1
    assert called(*asked).stdout.endswith(f"20 of {rows:,} rows (--limit)\n")
    assert called(*asked, "--limit", 7).stdout.endswith(f"\n7 of {rows:,} rows (--limit)\n")
    assert called(*asked, "--limit", rows).stdout.endswith(f"\n{rows:,} rows\n")
    assert len(json_lines(called(*asked, "--json", "--limit", 7).stdout)) == 7


@pytest.mark.parametrize(
    "question",
    [
        "--token| Paris",
        "--token| Paris|--show|neurons",
        "--neuron|1.mlp.down.1",
        "--neuron|1.mlp.down.1|--show|similar",
        "--prompt|1",
        "--prompt|1|--show|neurons",
        "--prompt|1|--show|tokens",
        "--prompt|1|--compare|2",
        "--show|tokens",
        "--show|curves",
        "--show|coverage",
        "--show|groups|--by|subject",
    ],
)
def test_every_question_says_how_many_rows_it_has(example: ExampleRun, question: str):
    asked = ("query", example.out, *question.split("|"))
    rows = len(json_lines(called(*asked, "--json").stdout))
    assert rows > 1
    assert f"\n1 of {rows:,} rows (--limit)\n" in called(*asked, "--limit", 1).stdout


def test_python_has_every_row_and_counts_them_where_it_is_told_to_stop(example: ExampleRun):
    with Atlas(example.out) as atlas:
        rows = len(example.rows["tokens"])
        assert atlas.sql("FROM tokens").num_rows == rows
        few = atlas.sql("FROM tokens", limit=3)
        assert (few.num_rows, few.total) == (3, rows)
        assert f"{rows:,} rows, 3 of them here (limit)" in few._repr_html_()
        every = atlas.by_token(" Paris")
        assert every.total == every.num_rows == atlas.by_token(" Paris", limit=2).total > 10
        assert atlas.by_token(" Paris", limit=2).num_rows == 2


def test_an_answer_is_rows_to_pandas(example: ExampleRun):
    with Atlas(example.out) as atlas:
        answer = atlas.by_token(" Paris")
        frame = pd.DataFrame(answer)
        assert list(frame.columns) == answer.column_names
        assert frame["place"].tolist() == answer["place"].to_pylist()
        assert list(answer) == answer.to_pylist()
        assert pa.table(answer).equals(answer.table)  # what polars.from_arrow takes is `answer.table`


# No value is lost on its way, whatever its type.

VALUES = {
    "NULL": None,
    "true": True,
    "1.5": 1.5,
    "'nan'::DOUBLE": None,
    "'-inf'::FLOAT": None,
    "1::DECIMAL(38, 0)": 1,
    "1.10::DECIMAL(38, 20)": "1.10000000000000000000",
    "170141183460469231731687303715884105727::HUGEINT": 2**127 - 1,
    "340282366920938463463374607431768211455::UHUGEINT": str(2**128 - 1),
    "18446744073709551615::UBIGINT": 2**64 - 1,
    "INTERVAL '1 month 2 days'": "1 month 2 days",
    "[INTERVAL 1 DAY, NULL]": ["1 day", None],
    "{'a': DATE '2020-01-02', 'b c': ['inf'::DOUBLE, 1]}": {"a": "2020-01-02", "b c": [None, 1.0]},
    "MAP {DATE '2020-01-02': INTERVAL 1 DAY}": {"2020-01-02": "1 day"},
    "[{'a': [INTERVAL 1 DAY]}]": [{"a": ["1 day"]}],
    "'\\xAA\\x1Bok'::BLOB": "\\xAA\\x1Bok",
    "'infinity'::DATE": "infinity",
    "DATE '99999-01-01'": "99999-01-01",
    "TIMESTAMP_NS '2020-01-01 00:00:00.123456789'": "2020-01-01 00:00:00.123456789",
    "TIMETZ '10:00:00+02'": "10:00:00+02",
    "TIMESTAMPTZ '2020-01-01 00:00:00+00'::VARCHAR IS NOT NULL": True,
    "'10101'::BIT": "10101",
    "union_value(a := 1)": "1",
    "'b'::ENUM('a', 'b')": "b",
    "[1, 2]::INT[2]": [1, 2],
    "'x'::VARIANT": "x",
    "row(1, 'a')": "(1, a)",
    "uuid() IS NOT NULL": True,
    "'null'": "null",
    "''": "",
}


@pytest.mark.parametrize("expression", VALUES)
def test_values_of_any_type_are_json_csv_and_text(example: ExampleRun, expression: str):
    asked = ("query", example.out, "--sql", f"SELECT {expression} AS v, {expression} AS v, now() AS t")
    value = VALUES[expression]
    table = called(*asked)
    assert (table.status, table.stderr) == (0, "")
    (row,) = json_lines(called(*asked, "--json").stdout)
    assert row["v"] == row["v_1"] == value  # columns of one name are told apart
    assert isinstance(row["v"], type(value))


def test_every_type_is_a_cell_of_a_csv_file(example: ExampleRun):
    columns = ", ".join(f"{expression} AS c{index}" for index, expression in enumerate(VALUES))
    done = printed("query", example.out, "--sql", f"SELECT {columns}", "--csv")
    assert (done.status, done.stderr) == (0, "")
    _, cells = csv.reader(io.StringIO(done.stdout))
    floats = {"'nan'::DOUBLE": "nan", "'-inf'::FLOAT": "-inf"}
    for cell, (expression, value) in zip(cells, VALUES.items(), strict=True):
        if expression in floats:
            assert cell == floats[expression]
        elif isinstance(value, str):
            assert cell == value
        else:
            assert (json.loads(cell) if cell else None) == value


def test_nan_is_null_in_every_json_that_is_printed(hostile: str):
    assert (
        json_text({"a": [float("nan"), {"b": float("-inf")}], "c": 1.5})
        == '{"a": [null, {"b": null}], "c": 1.5}'
    )
    assert plain((1, float("inf"), b"\xff")) == [1, None, "\\xff"]
    for arguments in (
        ("status", hostile, "--json"),
        ("verify", hostile, "--json"),
        ("atlas", hostile, "--json"),
    ):
        done = called(*arguments)
        assert done.status == 0, done.stderr
        json.loads(done.stdout, parse_constant=lambda constant: pytest.fail(constant))


def test_json_is_written_in_one_place():
    """Digests, YAML and the demo's own files are no JSON for others; records of prompts are strict already."""
    elsewhere = {
        "plain",
        "drive",
        "untouched",
        "manifest",
        "places",
        "vocabulary",
        "draft",
        "fields",
        "survey",
    }
    for file in (ROOT / "pipeline").rglob("*.py"):
        if file.stem in elsewhere or file.parent.name == "demo":
            continue
        calls = [
            node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Attribute)
        ]
        wrong = [
            node.lineno
            for node in calls
            if node.attr in ("dumps", "dump") and ast.unparse(node.value) == "json"
        ]
        assert not wrong, f"{file}: lines {wrong}: pipeline.plain.json_text knows what JSON cannot hold"


# Nothing in data controls a terminal.

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def asks(out: str) -> list[tuple[object, ...]]:
    return [
        *(("query", out, "--prompt", 0), ("query", out, "--sql", "FROM prompts"), ("query", out, "--show", "groups")),
        *(("query", out, "--sql", "FROM failures"), ("query", out, "--prompt", 3), ("query", out, "--token", " Paris")),
        *(("query", out, "--sql", "FROM prompts", "--json"), ("status", out), ("status", out, "--json")),
        *(("query", out, "--token", HOSTILE), ("query", out, "--sql", f"SELECT '{HOSTILE}' AS \"{HOSTILE}\"")),
        *(("query", out, "--sql", f"SELECT {HOSTILE}"), ("query", HOSTILE, "--prompt", 0), ("status", HOSTILE)),
        *(("query", out, "--show", HOSTILE), ("query", out, "--show", "groups", "--by", HOSTILE)),
        *(("run", "--prompts", HOSTILE), ("run", f"--{HOSTILE}"), (HOSTILE,), ("atlas", HOSTILE)),
        *(("doctor", "--model", HOSTILE), ("plan", "--model", HOSTILE), ("serve", HOSTILE)),
        *(("run", "--prompts", HOSTILE, "--log-format", "json"), ("verify", HOSTILE)),
        ("edit", "--edits", HOSTILE),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(asks(""))))
def test_what_comes_from_data_controls_no_terminal(hostile: str, number: int):
    done = called(*asks(hostile)[number])
    assert done.stdout or done.stderr
    assert not CONTROL.findall(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr


def test_markup_and_emoji_codes_are_text_like_any_other(hostile: str):
    shown = called("query", hostile, "--sql", "SELECT prompt FROM prompts").stdout
    assert shown.count(printable(HOSTILE).replace("\\r", "␍")) == 3


def test_on_a_terminal_too_nothing_but_our_own_colours_is_sent(hostile: str):
    """CSV as well, which off a terminal is exact."""
    for style in ((), ("--csv",), ("--json",)):
        ours, theirs = pty.openpty()
        arguments = ("query", hostile, "--sql", "SELECT prompt FROM prompts LIMIT 1", *style)
        process = subprocess.Popen(
            [BACKLENS, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env=environment() | {"TERM": "xterm-256color", "COLUMNS": "400"},
        )
        os.close(theirs)
        received = b""
        while chunk := _read(ours):
            received += chunk
        assert process.wait() == 0
        os.close(ours)
        text = received.decode()
        assert "31mred" in text
        without_ours = re.sub("\x1b\\[[0-9;]*m|\r\n", "", text) if not style else text.replace("\r\n", "")
        assert "\x1b[31m" not in text
        assert not CONTROL.findall(without_ours)
    exact = printed("query", hostile, "--sql", "SELECT prompt FROM prompts LIMIT 1", "--csv").stdout
    assert list(csv.reader(io.StringIO(exact, newline="")))[1] == [HOSTILE]


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux says so when the other side is closed
        return b""


# Any encoding will do.


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("run", "--help"),
        ("edit", "explain", "--help"),
        ("query", "OUT", "--prompt", "0"),
        ("query", "OUT", "--sql", "FROM prompts"),
        ("query", "OUT", "--token", "δ"),
        ("status", "OUT"),
    ],
    ids=lambda arguments: "-".join(arguments[:2]),
)
def test_a_terminal_of_another_encoding_is_written_to(
    hostile: str, arguments: tuple[str, ...], encoding: str
):
    done = printed(*(hostile if word == "OUT" else word for word in arguments), encoding=encoding)
    assert done.status == (2 if "δ" in arguments else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout or done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_json_is_the_same_in_every_encoding(hostile: str, encoding: str):
    done = printed("query", hostile, "--sql", "SELECT prompt FROM prompts", "--json", encoding=encoding)
    assert [row["prompt"] for row in json_lines(done.stdout)] == [HOSTILE] * 3
