"""`status` reports the content of a run directory."""

import errno
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from backlens.cli.main import call
from backlens.errors import BacklensError
from backlens.store.directory import Directory
from backlens.store.lock import DriverLock, find_holder
from backlens.store.status import run_status
from tests.store.examples import example_run

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def directory(tmp_path: Path) -> Directory:
    return Directory.at(tmp_path / "run")


def test_a_finished_run_is_counted_row_by_row(tmp_path: Path) -> None:
    example = example_run(directory(tmp_path), shards=3)
    status = run_status(example.out)
    assert (status.state, status.shards_committed, status.shards) == ("done", 3, 3)
    assert (status.prompts, status.prompts_done, status.prompts_failed) == (12, 11, 1)
    assert status.rows == {name: len(rows) for name, rows in example.rows.items()}
    assert status.bytes == sum(path.stat().st_size for path in (tmp_path / "run").glob("*/part-000*.parquet"))
    assert (status.driver, status.prompts_per_second, status.seconds_left) == (None, None, None)


def test_a_run_without_a_driver_is_stopped(tmp_path: Path) -> None:
    example = example_run(directory(tmp_path), shards=3, committed=1)
    status = run_status(example.out)
    assert (status.state, status.shards_committed, status.shards) == ("stopped", 1, 3)
    assert (status.prompts_done, status.prompts_failed) == (3, 1)


def test_a_run_that_has_committed_nothing_yet_has_no_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = directory(tmp_path)
    example_run(place, shards=3, committed=0)
    with DriverLock(place):
        status = run_status(place.root)
        assert call(["status", place.root]) == 0
    assert (status.state, status.shards_committed, status.prompts_done, status.bytes) == ("running", 0, 0, 0)
    assert (status.last_commit_at, status.prompts_per_second, status.seconds_left) == (None, None, None)
    table = capsys.readouterr().out
    assert "0 of 3" in table
    assert "none yet" in table


@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_driver_at_work_is_named(where: str, tmp_path: Path) -> None:
    place = directory(tmp_path) if where == "local" else Directory.at(f"memory://{tmp_path.name}")
    example_run(place, shards=3, committed=1)
    assert find_holder(place) is None
    with DriverLock(place):
        status = run_status(place.root)
        assert status.state == "running"
        assert status.driver is not None
        assert status.driver.pid == os.getpid()
    assert run_status(place.root).state == "stopped"


def test_a_lock_file_that_a_killed_driver_left_means_nothing(tmp_path: Path) -> None:
    example_run(directory(tmp_path), shards=3, committed=1)
    left = {"host": "here", "pid": os.getpid(), "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "run" / "_driver.lock").write_text(json.dumps(left))
    assert run_status(str(tmp_path / "run")).state == "stopped"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_run_on_a_file_system_without_locks_has_a_status(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = example_run(directory(tmp_path), shards=3, committed=1)
    (tmp_path / "run" / "_driver.lock").write_text("{}")

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert call(["status", example.out, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert (fields["state"], fields["driver"], fields["shards_committed"]) == ("stopped", None, 1)


def test_looking_on_does_not_keep_a_driver_out(tmp_path: Path) -> None:
    place = directory(tmp_path)
    example_run(place, shards=2, committed=1)
    with DriverLock(place):
        pass
    look = f"run_status({place.root!r})"
    code = f"from backlens.store.status import run_status\n{look}\nprint(flush=True)\nwhile True: {look}"
    looking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert looking.stdout is not None
        looking.stdout.readline()
        for _ in range(300):
            with DriverLock(place):
                pass
    finally:
        looking.kill()
        looking.wait()


def _set_times(run: Path, seconds_ago: list[float]) -> None:
    for shard, ago in enumerate(seconds_ago):
        path = run / "_commits" / f"{shard:06d}.json"
        written = (NOW - timedelta(seconds=ago)).isoformat(timespec="seconds")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"written_at": written}))


@pytest.mark.parametrize(
    ("seconds_ago", "rate"),
    [
        ([40, 30, 20, 10, 0], 0.4),
        ([40, 30, 20, 10, 5], 16 / 35),
        ([100000, 99990, 20, 10, 0], 0.4),  # two by an earlier driver
        ([140, 130, 120, 110, 100], 16 / 130),  # nothing for 100 s, where 10 were to be expected
        ([0, 0, 0, 0, 0], None),
        ([100000, 100000, 100000, 100000, 0], None),
    ],
)
def test_the_rate_is_that_of_the_driver_at_work(
    seconds_ago: list[float], rate: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = directory(tmp_path)
    example_run(place, shards=8, committed=5)
    _set_times(tmp_path / "run", seconds_ago)
    since = (NOW - timedelta(seconds=1000)).isoformat(timespec="seconds")
    monkeypatch.setattr("backlens.store.lock._now", lambda: since)
    with DriverLock(place):
        status = run_status(place.root, NOW)
    assert status.prompts_per_second == pytest.approx(rate)
    assert status.seconds_left == pytest.approx(None if rate is None else 12 / rate)


def test_the_command_prints_a_table_or_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = example_run(directory(tmp_path), shards=2)
    assert call(["status", example.out]) == 0
    table = capsys.readouterr().out
    for words in ("done", "2 of 2", "7 of 8 done, 1 failed"):
        assert words in table
    assert call(["status", example.out, "--json"]) == 0
    fields: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (fields["state"], fields["prompts_done"], fields["prompts_failed"]) == ("done", 7, 1)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BacklensError, match="not a run directory"):
        run_status(str(tmp_path))
    assert call(["status", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_status_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    example = example_run(directory(tmp_path), shards=1)
    code = (
        "import sys; from backlens.cli.main import call; "
        f"assert call(['status', {example.out!r}]) == 0; "
        "assert not {'torch', 'ray', 'transformers', 'duckdb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
