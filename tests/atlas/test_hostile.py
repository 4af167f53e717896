"""Whatever is given to `backlens query`: one line and status 2, or an answer, and nothing written or read beside."""

from pathlib import Path

import pytest

from backlens.cli.main import call
from backlens.store.directory import Directory
from tests.atlas.test_query import hostile, snapshot
from tests.store.examples import ExampleRun, example_run

WORDS = [
    "' OR 1=1 --",
    "'; COPY layers TO 'stolen.parquet'; --",
    "$ids",
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "%",
    "\x00",
    "é" * 5000,
    "9" * 400,
    "-1",
    "1e999",
    "nan",
    "{}",
    "read_text('/etc/passwd')",
]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ExampleRun:
    return example_run(Directory.at(tmp_path_factory.mktemp("run")))


def questions(word: str) -> list[list[str]]:
    """The word in every place that takes one."""
    of_run = [["--show", "groups", f"--by={word}"], ["--show", "curves", f"--module={word}"]]
    of_prompt = [["--prompt=1", f"--{name}={word}"] for name in ("show", "compare", "module", "layer")]
    alone = [[f"--{name}={word}"] for name in ("token", "neuron", "prompt", "sql", "show", "compare")]
    return [*of_run, *of_prompt, *alone, [f"--neuron=1.{word}.1"], [f"--neuron=1.mlp.up.{word}"]]


@pytest.mark.parametrize("word", WORDS, ids=lambda word: repr(word[:20]))
def test_words_in_names_are_names(
    example: ExampleRun,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    before = snapshot(example.out)
    for options in questions(word):
        status = call(["query", example.out, *options])
        printed = capsys.readouterr()
        assert status in (0, 2), options
        assert "Traceback" not in printed.err
        assert "root:" not in printed.out
        if status == 2:
            assert printed.err.count("\n") == 1, options
            assert printed.out == ""
    assert snapshot(example.out) == before
    assert not list(tmp_path.iterdir())


def test_sql_on_the_command_line_only_reads(
    example: ExampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    before = snapshot(example.out)
    for statement in hostile(example.out)[::3]:
        assert call(["query", example.out, f"--sql={statement}"]) == 2, statement
        assert capsys.readouterr().err.count("\n") == 1
    assert snapshot(example.out) == before
    assert not list(tmp_path.iterdir())
