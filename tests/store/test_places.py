"""A run directory is resumed and repeated from its own `config.yaml`, wherever it was moved or copied to."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine.command import called, error_line, snapshot
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, and a finished run of them in `runs/one`."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny(folder / "model[1]")
    (folder / "p.jsonl").write_text(
        '{"prompt": "a b c", "target": " d"}\n{"prompt": "a b", "target": " c"}\n'
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        options = ("--model", "model[1]", "--prompts", "p.jsonl", "--layers", "0", "--shard-prompts", 1)
        done = called("run", *options, "--out", "runs/one", "--executor", "local")
    finally:
        os.chdir(before)
    assert done.status == 0, done.stderr
    return folder


@pytest.fixture
def copied(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, so that each test may move them."""
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-cache"))
    return folder


def replayed(folder: Path, *options: Any) -> Any:
    """`backlens run config.yaml` inside the folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return called("run", "config.yaml", *options)
    finally:
        os.chdir(before)


def test_paths_are_relative_to_the_file_and_out_is_its_own_folder(copied: Path):
    options = yaml.safe_load((copied / "runs/one/config.yaml").read_text())
    assert (options["model"], options["prompts"], options["out"]) == ("../../model[1]", "../../p.jsonl", ".")
    assert json.loads((copied / "runs/one/run.json").read_text())["config"]["model"] == "../../model[1]"


def test_a_finished_run_has_nothing_to_do_in_its_own_folder(copied: Path):
    one = copied / "runs" / "one"
    before = {path.name for path in one.iterdir()}
    done = replayed(one)
    assert done.status == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert {path.name for path in one.iterdir()} == before


def test_a_run_that_was_moved_is_resumed_where_it_is_now(copied: Path):
    moved = copied / "archive" / "another name"
    moved.parent.mkdir()
    (copied / "runs" / "one").rename(moved)
    (moved / "_commits" / "000001.json").unlink()
    done = replayed(moved)
    assert done.status == 0, done.stderr
    assert "1 more were done before" in done.stdout
    assert sorted(path.name for path in (moved / "_commits").iterdir()) == ["000000.json", "000001.json"]
    assert not (copied / "runs" / "one").exists()


def test_the_file_is_replayed_from_any_folder(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    done = called("run", copied / "runs/one/config.yaml", "--out", "again")
    assert done.status == 0, done.stderr
    assert (tmp_path / "again" / "run.json").exists()


def test_files_that_did_not_move_along_are_found_by_whoever_ran_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    moved = tmp_path / "far" / "away" / "from" / "it"
    shutil.copytree(project / "runs" / "one", moved)
    done = replayed(moved)
    assert done.status == 0, done.stderr
    assert "nothing to do" in done.stdout
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of-another-user"))
    shutil.copytree(project / "runs" / "one", tmp_path / "copy")
    refused = replayed(tmp_path / "copy")
    assert refused.status == 2
    assert "model[1]" in error_line(refused)


def test_the_bundled_demo_is_found_wherever_the_package_is(tmp_path: Path):
    out = tmp_path / "out"
    first = called("run", "--out", out, "--limit", 2, "--layers", "0", "--executor", "local")
    assert first.status == 0, first.stderr
    options = yaml.safe_load((out / "config.yaml").read_text())
    assert (options["model"], options["prompts"]) == (None, None)
    again = replayed(out)
    assert again.status == 0, again.stderr
    atlas = called("atlas", out, "--json")
    facts = json.loads((out / "run.json").read_text())["model"]
    assert json.loads(atlas.stdout)["weights"]["digest"] == facts["weight_hash"]


def test_a_file_of_options_that_is_no_runs_own_means_what_it_says(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"model": "model[1]", "prompts": "p.jsonl", "layers": "0", "executor": "local"})
    )
    done = called("run", tmp_path / "config.yaml", "--out", tmp_path / "out")
    assert done.status == 0, done.stderr


def test_the_options_of_a_sweep_are_not_those_of_a_run(tmp_path: Path):
    made = called("edit", "sweep", tmp_path / "s", "--layers", 5, "--lr", 0.8, "--limit", 1)
    assert made.status == 0, made.stderr
    refused = called("run", tmp_path / "s" / "config.yaml")
    assert refused.status == 2
    assert "edit sweep" in error_line(refused)


def test_a_refused_command_leaves_no_folder(project: Path, tmp_path: Path):
    for options in (("--prompts", tmp_path / "none.jsonl"), ("--modules", "nonsense")):
        refused = called(
            "run", "--model", project / "model[1]", *options, "--out", tmp_path / "a" / "b" / "c"
        )
        assert refused.status == 2
        assert list(tmp_path.iterdir()) == []


def test_a_refused_command_leaves_a_folder_that_was_there_as_it_was(project: Path, tmp_path: Path):
    (tmp_path / "a").mkdir()
    refused = called(
        "run", "--model", project / "model[1]", "--prompts", "none.jsonl", "--out", tmp_path / "a" / "b"
    )
    assert refused.status == 2
    assert snapshot(tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
