"""Sweeps on the executors of runs: the rows are the same, and a death costs only the current shard."""

from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests.engine.cluster import kill, one_node_cluster, workers
from tests.engine.command import called, count_commits, error_line, finish, start, wait_for

GRID = ("--layers", "4-6", "--lr", "1,1.6", "--limit", "40", "--at-once", "1,20")
SHARDS = 3 * 2 * (1 + 1)


def rows(out: Path) -> list[tuple[Any, ...]]:
    query = "SELECT * EXCLUDE (seconds_edit, seconds_evaluate) FROM '{}/edits/*.parquet' ORDER BY trial, prompt_id"
    return duckdb.connect().execute(query.format(out)).fetchall()


@pytest.mark.slow
def test_a_sweep_goes_on_through_the_deaths_of_a_worker_and_of_its_driver(
    tmp_path: Path, probes: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    grid = (*GRID, "--untouched", probes / "untouched.jsonl", "--held-out", probes / "held-out.txt")
    assert called("edit", "sweep", here, *grid).status == 0
    with one_node_cluster(cpus=2) as (address, head):
        on_ray = ("edit", "sweep", there, *grid, "--executor", "ray", "--workers", 2, "--address", address)
        first = start(*on_ray)
        wait_for(lambda: count_commits(there) or first.poll() is not None, every=0.05)
        kill(workers(head)[:1])
        before = count_commits(there)
        wait_for(lambda: count_commits(there) > before or first.poll() is not None, every=0.05)
        assert first.poll() is None, finish(first)
        first.kill()
        first.wait()
        wait_for(lambda: not workers(head))  # Ray ends them some moments after their driver
        left = SHARDS - count_commits(there)
        assert 0 < left < SHARDS

        second = start(*on_ray)
        victims = wait_for(lambda: workers(head) or second.poll() is not None, every=0.05)
        kill(victims[:1])
        done = finish(second)

    assert done.status == 0, done.stderr
    assert "shards were done before" in done.stdout
    assert "workers that died and were replaced: 1" in done.stdout
    assert "Traceback" not in done.stderr
    assert rows(there) == rows(here)


def test_a_missing_file_is_said_before_anything_is_started(tmp_path: Path) -> None:
    for method, flag in (("rome", "--text"), ("mend", "--editor")):
        asked = ("edit", "sweep", tmp_path / "s", "--methods", method, "--layers", "5", "--executor", "ray")
        refused = called(*asked)
        assert refused.status == 2
        assert flag in error_line(refused)


def test_workers_are_for_ray(tmp_path: Path) -> None:
    done = called("edit", "sweep", tmp_path / "s", "--layers", "5", "--lr", "1", "--workers", 2)
    assert done.status == 2
    assert "--executor ray" in done.stderr
