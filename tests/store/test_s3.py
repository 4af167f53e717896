"""Runs on an S3 server that is reached over HTTP, while one request in twenty fails."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backlens.store import lock
from backlens.store.directory import Directory
from tests.engine.cluster import free_ports
from tests.engine.command import (
    assert_complete,
    assert_same_run,
    backlens,
    called,
    error_line,
    interrupt,
    start,
    wait_for,
    write_jsonl,
)
from tests.engine.conftest import some_prompts
from tests.s3 import BUCKET, FAULTS, S3Server, s3_server
from tests.tiny import save_tiny

PROMPTS = 12


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server(share=0.05, seed=4) as started:
        yield started


@pytest.fixture(scope="module")
def command(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A run of many short shards whose prompts are on the store, without its --out and --executor."""
    folder = tmp_path_factory.mktemp("s3")
    prompts = write_jsonl(folder / "prompts.jsonl", some_prompts(PROMPTS, longest=12))
    server.store.put_file(prompts, f"{BUCKET}/prompts.jsonl")
    model = save_tiny(folder / "model")
    options = ("--shard-prompts", 2, "--neurons", 4, "--top-k", 5, "--layers", 0)
    return ("run", "--model", model, "--prompts", f"s3://{BUCKET}/prompts.jsonl", *options)


@pytest.fixture(scope="module")
def local(command: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on a disk."""
    out = tmp_path_factory.mktemp("runs") / "local"
    done = called(*command, "--out", out, "--executor", "local")
    assert done.status == 0, done.stderr
    return out


def _fetched(server: S3Server, name: str, folder: Path) -> Path:
    """A copy of a run in the store, made without the proxy."""
    server.store.get(f"{BUCKET}/{name}", str(folder / name), recursive=True)
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp?/layers=[0,1]", "a*b"])
def test_a_run_on_a_store_is_read_by_its_own_name(
    name: str, server: S3Server, command: tuple[object, ...]
) -> None:
    out = f"s3://{BUCKET}/names/{name}"
    for where in (f"s3://{BUCKET}/names/aXb", out, out):  # the third resumes
        done = called(*command, "--out", where, "--executor", "local", "--limit", 4)
        assert done.status == 0, done.stderr
    counted = called("query", out, "--sql", "SELECT count(*) AS n FROM prompts", "--json")
    assert (counted.status, counted.stdout) == (0, '{"n": 4}\n')
    assert called("status", out).status == 0


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_run_on_a_failing_store_gives_the_tables_of_a_local_run(
    executor: str, server: S3Server, command: tuple[object, ...], local: Path, tmp_path: Path
) -> None:
    before = server.faults()
    done = backlens(*command, "--out", f"s3://{BUCKET}/{executor}", "--executor", executor)
    assert done.status == 0, done.stderr
    assert sum(server.faults().get(fault, 0) - before.get(fault, 0) for fault in FAULTS) >= 3
    out = _fetched(server, executor, tmp_path)
    assert_complete(out, PROMPTS)
    assert_same_run(out, local)
    assert not (out / "_driver.lock").exists()


@pytest.mark.slow
def test_a_killed_run_on_a_store_goes_on_from_what_is_committed(
    server: S3Server,
    command: tuple[object, ...],
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--out", f"s3://{BUCKET}/killed", "--executor", "local")
    first = start(*command, *options)
    wait_for(lambda: len(_records(server)) >= 2 or first.poll() is not None, every=0.05)
    killed = interrupt(first, signal.SIGKILL)
    assert killed.status == -signal.SIGKILL, killed.stderr
    before = _records(server)
    assert 2 <= len(before) < PROMPTS // 2
    assert json.loads(called("status", f"s3://{BUCKET}/killed", "--json").stdout)["state"] == "running"

    monkeypatch.setattr(lock, "STALE_SECONDS", 2.0)
    done = called(*command, *options)

    assert done.status == 0, done.stderr
    assert f"{2 * len(before)} of them are done already" in done.stderr
    assert before.items() <= _records(server).items()
    assert_complete(_fetched(server, "killed", tmp_path), PROMPTS)
    assert_same_run(tmp_path / "killed", local)
    _can_be_asked(f"s3://{BUCKET}/killed", local)


def _records(server: S3Server) -> dict[str, str]:
    """The commit records and when they were written."""
    found: Any = server.store.find(f"{BUCKET}/killed/_commits", detail=True)
    # Seen once in a full run: an entry without a time. Such a record is not counted as written yet.
    return {
        name: str(details["LastModified"]) for name, details in found.items() if "LastModified" in details
    }


def _can_be_asked(url: str, local: Path) -> None:
    """Commands that read a run give the same results as on a disk, also after an atlas is built there."""
    status = json.loads(called("status", url, "--json").stdout)
    assert (status["state"], status["prompts_done"]) == ("done", PROMPTS)
    question = ("--token", "a", "--json")
    built = called("atlas", url)
    assert built.status == 0, built.stderr
    answer = called("query", local, *question)
    assert answer.stdout
    assert called("query", url, *question).stdout == answer.stdout


def test_only_one_of_two_creates_an_object(server: S3Server) -> None:
    directory = Directory.at(f"s3://{BUCKET}/created")
    for content in (b"first", b"second"):
        directory.create("one", content)
    assert server.store.cat_file(f"{BUCKET}/created/one") == b"first"


@pytest.mark.parametrize("name", ["status", "run"])
def test_wrong_credentials_are_said_in_one_line(
    name: str, server: S3Server, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    server.store.clear_instance_cache()
    url = f"s3://{BUCKET}/refused"
    refused = called(*command, "--out", url) if name == "run" else called("status", url)
    server.store.clear_instance_cache()
    assert refused.status == 2
    assert error_line(refused).startswith(f"out: {url}/")
    assert error_line(refused).endswith("; see that the credentials are right")
    assert not server.store.exists(url)


def test_a_missing_bucket_is_said_in_one_line_and_not_made(
    server: S3Server, command: tuple[object, ...]
) -> None:
    refused = called(*command, "--out", "s3://mistyped/run")
    assert refused.status == 2
    assert error_line(refused).startswith("out: cannot write s3://mistyped/run/")
    assert "bucket does not exist" in error_line(refused)
    assert server.store.ls("") == [BUCKET]
    assert called("status", "s3://mistyped/run").status == 2


@pytest.mark.parametrize("name", ["status", "run"])
def test_a_server_that_is_down_is_said_in_one_line_and_in_time(
    name: str, server: S3Server, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    monkeypatch.setattr("backlens.store.directory.WAIT_SECONDS", 0.1)
    server.store.clear_instance_cache()
    began = time.monotonic()
    url = f"s3://{BUCKET}/unreachable"
    stopped = called(*command, "--out", url) if name == "run" else called("status", url)
    server.store.clear_instance_cache()
    assert stopped.status == 3
    assert error_line(stopped).startswith(f"out: {url}/")
    assert "Could not connect to the endpoint" in error_line(stopped)
    assert time.monotonic() - began < 10
