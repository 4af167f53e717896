"""A command for a directory of another kind says in one line what it needs and what it got."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backlens.atlas import Atlas
from backlens.errors import BacklensError
from backlens.store.directory import Directory
from tests.engine.command import called, error_line, snapshot
from tests.store.examples import example_run


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, an edit sweep, and other folders."""
    folder = tmp_path_factory.mktemp("kinds")
    made = called("edit", "sweep", folder / "sweep", "--layers", 5, "--lr", 0.8, "--limit", 1)
    assert made.status == 0, made.stderr
    example_run(Directory.at(folder / "run"))
    (folder / "empty").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("years of work")
    (folder / "file").write_text("no folder")
    shutil.copytree(folder / "run", folder / "without")
    (folder / "without" / "run.json").unlink()
    return folder


OF_RUNS: list[tuple[str, ...]] = [
    ("atlas", "OUT"),
    ("query", "OUT", "--prompt", "0"),
    ("query", "OUT", "--prompt", "0", "--compare", "1"),
    ("query", "OUT", "--token", " a"),
    ("query", "OUT", "--neuron", "0.mlp.up.1"),
    *(("query", "OUT", "--show", show) for show in ("specific", "tokens", "curves", "groups", "coverage")),
    ("query", "RUN", "--compare", "OUT"),
    ("query", "OUT", "--compare", "RUN"),
    ("plot", "OUT", "--to", "x.svg"),
    ("plot", "OUT", "--prompt", "0", "--to", "x.svg"),
    ("serve", "OUT"),
    ("export-html", "OUT", "--prompt", "0", "--to", "x.html"),
]
OF_BOTH: list[tuple[str, ...]] = [("status", "OUT"), ("verify", "OUT"), ("query", "OUT", "--sql", "SELECT 1")]
OF_SWEEPS: list[tuple[str, ...]] = [("plot", "edits", "OUT", "--to", "x.svg")]
NEITHER = {
    "empty": "it is empty",
    "foreign": "it has no run.json",
    "file": "it is a file",
    "nowhere": "there is no such directory",
    "without": "its run.json is missing",
}


def refused(command: tuple[str, ...], out: Path, folder: Path) -> str:
    words = [
        str(out) if word == "OUT" else str(folder / "run") if word == "RUN" else word for word in command
    ]
    done = called(*words)
    assert done.status == 2, (words, done.stdout)
    return error_line(done)


@pytest.mark.parametrize("command", OF_RUNS, ids=" ".join)
def test_a_sweep_is_refused_where_a_run_is_needed(
    command: tuple[str, ...], kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = snapshot(kinds / "sweep")
    assert "sweep is an edit sweep, and this needs a run" in refused(command, kinds / "sweep", kinds)
    assert snapshot(kinds / "sweep") == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", OF_SWEEPS, ids=" ".join)
def test_a_run_is_refused_where_a_sweep_is_needed(command: tuple[str, ...], kinds: Path):
    assert "run is a run, and this needs an edit sweep" in refused(command, kinds / "run", kinds)


@pytest.mark.parametrize("name", NEITHER)
@pytest.mark.parametrize("command", OF_RUNS + OF_BOTH + OF_SWEEPS, ids=" ".join)
def test_what_is_neither_is_refused_with_what_it_is(command: tuple[str, ...], name: str, kinds: Path):
    said = refused(command, kinds / name, kinds)
    assert "is not a run directory" in said
    assert NEITHER[name] in said


def test_a_run_and_a_sweep_do_not_go_on_with_each_other(kinds: Path):
    run = called("run", "--limit", 1, "--layers", "0", "--executor", "local", "--out", kinds / "sweep")
    assert (run.status, "is an edit sweep, and this makes a run" in error_line(run)) == (2, True)
    sweep = called("edit", "sweep", kinds / "run", "--layers", 5, "--lr", 0.8, "--limit", 1)
    assert (sweep.status, "is a run, and this makes an edit sweep" in error_line(sweep)) == (2, True)
    for words in (
        ("run", "--layers", "0", "--limit", 1, "--out"),
        ("edit", "sweep", "--lr", 0.8, "--limit", 1),
    ):
        file = called(*words, kinds / "file")
        assert (file.status, "is a file" in error_line(file)) == (2, True)


METHODS: list[Callable[[Atlas], Any]] = [
    lambda atlas: atlas.by_prompt(0),
    lambda atlas: atlas.prompt(0),
    lambda atlas: atlas.by_token(" a"),
    lambda atlas: atlas.by_neuron("0.mlp.up.1"),
    lambda atlas: atlas.groups(),
    lambda atlas: atlas.coverage(),
    lambda atlas: atlas.layer_curves(),
    lambda atlas: atlas.compare_prompts(0, 1),
]


@pytest.mark.parametrize("method", METHODS)
def test_an_atlas_of_a_sweep_answers_sql_alone(method: Callable[[Atlas], Any], kinds: Path):
    atlas = Atlas(str(kinds / "sweep"))
    with pytest.raises(BacklensError, match="is an edit sweep, and this needs a run"):
        method(atlas)
    assert atlas.sql("SELECT count(*) AS n FROM edits")["n"].to_pylist() == [1]


def test_the_status_of_a_sweep_counts_its_edits(kinds: Path):
    shown = called("status", kinds / "sweep")
    assert shown.status == 0
    assert "1 of 1 done" in shown.stdout
