"""Prompts from a pipe: a run reads them although it needs them twice, and a plan refuses them in one line."""

import os
import threading
from pathlib import Path

import pytest

from tests.engine.command import assert_complete, assert_same_run, called, error_line, write_jsonl
from tests.engine.conftest import some_prompts


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A pipe into which nothing writes yet."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_a_run_of_prompts_from_a_pipe_equals_one_of_the_file(gpt2: Path, pipe: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", some_prompts(7))
    run = ("run", "--model", gpt2, "--executor", "local", "--format", "jsonl", "--shard-prompts", 3)
    writer = threading.Thread(target=lambda: pipe.write_bytes(prompts.read_bytes()), daemon=True)
    writer.start()
    done = called(*run, "--prompts", pipe, "--out", tmp_path / "piped")
    assert done.status == 0, done.stderr
    assert called(*run, "--prompts", prompts, "--out", tmp_path / "read").status == 0
    assert_complete(tmp_path / "piped", 7)
    assert_same_run(tmp_path / "piped", tmp_path / "read")


def test_a_pipe_of_unknown_format_and_a_plan_are_refused_before_the_pipe_is_read(
    gpt2: Path, pipe: Path, tmp_path: Path
) -> None:
    given = ("--model", gpt2, "--prompts", pipe, "--out", tmp_path / "out")
    run = called("run", *given, "--executor", "local")
    assert (run.status, "--format jsonl" in error_line(run)) == (2, True)
    plan = called("plan", *given, "--format", "jsonl")
    assert (plan.status, "write them to a file" in error_line(plan)) == (2, True)
