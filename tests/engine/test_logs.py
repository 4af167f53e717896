"""Standard error as JSON: every line parses, and says what the run did."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from backlens.cli.console import log_format
from tests.engine.cluster import workers
from tests.engine.command import called, commits, finish, start, wait_for, write_jsonl
from tests.engine.conftest import some_prompts


def events(stderr: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert all({"time", "level", "event"} <= line.keys() for line in lines)
    return lines


def named(lines: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


def test_every_line_of_a_run_is_an_object_with_shards_failures_and_a_summary(
    gpt2: Path, tmp_path: Path
) -> None:
    records = [*some_prompts(7), {"prompt": "no target"}]
    prompts, out = write_jsonl(tmp_path / "prompts.jsonl", records), tmp_path / "out"
    options = ("--model", gpt2, "--prompts", prompts, "--out", out, "--executor", "local")
    done = called("run", *options, "--shard-prompts", 4, "--log-format", "json")
    assert done.status == 1
    lines = events(done.stderr)
    assert [line["event"] for line in lines] == [
        "planned",
        "note",
        "started",
        "shard",
        "shard",
        "failures",
        "finished",
    ]
    shards = named(lines, "shard")
    assert sorted(line["shard"] for line in shards) == [0, 1]
    assert (sum(line["prompts"] for line in shards), sum(line["failed"] for line in shards)) == (8, 1)
    assert all(line["seconds"]["lens"] > 0 for line in shards)
    assert named(lines, "failures")[0]["level"] == "warning"
    assert named(lines, "finished")[0]["rows"]["prompts"] == 7


def test_an_error_is_an_object_too(tmp_path: Path) -> None:
    refused = called("run", "--model", tmp_path / "none", "--out", tmp_path / "out", "--log-format=json")
    (line,) = events(refused.stderr)
    assert (refused.status, line["event"], line["level"]) == (2, "error", "error")
    assert "none" in line["message"]
    assert called("run", "--modles", "x").stderr.startswith("backlens: ")


def test_what_is_printed_is_the_same_in_either_format(gpt2: Path, prompts_file: Path, tmp_path: Path) -> None:
    options = ("--model", gpt2, "--prompts", prompts_file, "--out", tmp_path / "out", "--executor", "local")
    assert called("run", *options).status == 0
    text, lines = called("run", *options), called("run", *options, "--log-format", "json")
    assert text.stdout == lines.stdout
    assert named(events(lines.stderr), "planned")[0]["prompts_done"] == 12


def test_a_format_is_known_before_the_command_line_is_parsed() -> None:
    assert log_format(["run", "--log-format", "json"]) == log_format(["run", "--log-format=json"]) == "json"
    assert log_format(["run"]) == log_format(["run", "--log-format", "text"]) == "text"


@pytest.mark.slow
def test_a_worker_that_is_killed_and_its_shards_are_logged(
    gpt2: Path, cluster: tuple[str, int], tmp_path: Path
) -> None:
    prompts, out = write_jsonl(tmp_path / "prompts.jsonl", some_prompts(600)), tmp_path / "out"
    options = ("--model", gpt2, "--prompts", prompts, "--out", out, "--address", cluster[0])
    run = start("run", *options, "--shard-prompts", 20, "--log-format", "json")
    wait_for(lambda: commits(out) if (out / "_commits").is_dir() else None)
    for worker in workers(cluster[1]):
        os.kill(worker.pid, signal.SIGKILL)
    done = finish(run)
    assert done.status == 0, done.stderr
    lines = events(done.stderr)
    (died,) = named(lines, "worker-died")
    retries = named(lines, "retry")
    assert died["level"] == "warning"
    assert 1 <= len(retries) <= 3
    assert named(lines, "finished")[0]["deaths"] == 1
    assert [line["alive"] for line in named(lines, "replicas")] == [1, 0, 1]
    assert {line["shard"] for line in named(lines, "shard")} == set(range(30))
