"""A run that is killed, interrupted or refused loses nothing, repeats nothing, and says what it did."""

import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from backlens.engine.executors.base import note
from backlens.store.directory import Directory
from tests.engine.cluster import alive, descendants, is_agent, kill, workers
from tests.engine.command import (
    assert_complete,
    assert_same_run,
    backlens,
    called,
    contents,
    count_commits,
    error_line,
    finish,
    interrupt,
    snapshot,
    start,
    wait_for,
    write_jsonl,
)
from tests.engine.conftest import some_prompts
from tests.engine.preloaded import fork

Command = tuple[object, ...]

PROMPTS = 40
MANY = 120
"""Prompts of a run that is to outlive a dozen kills."""


@pytest.fixture(scope="module")
def job(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A command of many short shards, without its --out and --executor."""
    return _job(gpt2, tmp_path_factory, PROMPTS)


@pytest.fixture(scope="module")
def long_job(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    return _job(gpt2, tmp_path_factory, MANY)


@pytest.fixture(scope="module")
def uninterrupted(job: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of `job` when nothing disturbs it."""
    return _left_alone(job, tmp_path_factory, PROMPTS)


@pytest.fixture(scope="module")
def long_uninterrupted(long_job: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _left_alone(long_job, tmp_path_factory, MANY)


def _job(model: Path, folders: pytest.TempPathFactory, count: int) -> Command:
    prompts = write_jsonl(folders.mktemp("prompts") / "prompts.jsonl", some_prompts(count, longest=12))
    return ("run", "--model", model, "--prompts", prompts, "--shard-prompts", 1, "--neurons", 4, "--top-k", 5)


def _left_alone(job: Command, folders: pytest.TempPathFactory, count: int) -> Path:
    out = folders.mktemp("runs") / "uninterrupted"
    done = called(*job, "--out", out, "--executor", "local")
    assert done.status == 0, done.stderr
    assert_complete(out, count)
    return out


@pytest.fixture
def run(uninterrupted: Path, tmp_path: Path) -> Path:
    """A finished run of the test's own."""
    return shutil.copytree(uninterrupted, tmp_path / "run")


@pytest.fixture
def forked(tmp_path: Path) -> Iterator[Any]:
    """Starts commands that are gone when the test ends, however it ends."""
    processes: list[ForkServerProcess] = []

    def start_fork(*arguments: object) -> ForkServerProcess:
        processes.append(fork(tmp_path / "log", *arguments))
        return processes[-1]

    yield start_fork
    for process in processes:
        process.kill()
        process.join()


def test_a_run_that_was_killed_goes_on_from_what_is_committed(
    job: Command, uninterrupted: Path, tmp_path: Path, forked: Any
) -> None:
    out = tmp_path / "out"
    process = forked(*job, "--out", out, "--executor", "local")
    wait_for(lambda: count_commits(out) >= 3)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = _records(out)
    assert 3 <= len(before) < PROMPTS
    note(Directory.at(out), 20, [20])  # of an attempt that went with the driver

    done = called(*job, "--out", out, "--executor", "local")

    assert done.status == 0, done.stderr
    assert f"{len(before):,} of them are done already" in done.stderr
    assert before.items() <= _records(out).items()
    assert_complete(out, PROMPTS)
    assert_same_run(out, uninterrupted)


@pytest.mark.slow
def test_a_local_run_survives_kills_at_random_instants(
    long_job: Command, long_uninterrupted: Path, tmp_path: Path, forked: Any
) -> None:
    out, draw = tmp_path / "out", random.Random(1)
    command = (*long_job, "--out", out, "--executor", "local")
    records: dict[str, tuple[int, bytes]] = {}
    for number in range(14):
        process = forked(*command)
        _wait_for_instant(number, draw, out, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert records.items() <= _records(out).items(), "a committed record was written again"
        records = _records(out)
    assert 0 < len(records) < MANY, "kills came before any commit, or after all of them"

    done = backlens(*command)

    assert done.status == 0, done.stderr
    assert_complete(out, MANY)
    assert_same_run(out, long_uninterrupted)


def _wait_for_instant(number: int, draw: random.Random, out: Path, process: ForkServerProcess) -> None:
    """Planning and loading, anywhere between commits, while files are staged, and while they get their names."""
    standing = count_commits(out)
    target = standing + draw.randint(1, 4)
    match number % 4:
        case 0:
            time.sleep(draw.uniform(0.0, 0.7))
        case 1:
            wait_for(lambda: count_commits(out) >= target or not process.is_alive())
            time.sleep(draw.uniform(0.0, 0.1))
        case 2:
            wait_for(lambda: count_commits(out) >= target or not process.is_alive())
            wait_for(lambda: any(out.glob("*/.part-*.tmp")) or not process.is_alive(), every=0)
            time.sleep(draw.uniform(0.0, 0.01))
        case _:
            wait_for(lambda: count_commits(out) >= target or not process.is_alive())
            wait_for(lambda: _files(out) > count_commits(out) or not process.is_alive(), every=0)


def _files(out: Path) -> int:
    return sum(1 for _ in (out / "prompts").glob("part-*.parquet"))


def _records(out: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "_commits").glob("*.json")
    }


@pytest.mark.slow
def test_a_ray_run_survives_deaths_while_models_are_loaded_and_leaves_no_worker_to_a_dead_driver(
    job: Command, uninterrupted: Path, tmp_path: Path, cluster: tuple[str, int], forked: Any
) -> None:
    address, head = cluster
    out = tmp_path / "out"
    command = (*job, "--out", out, "--executor", "ray", "--replicas", 2, "--address", address)

    killed = forked(*command)
    orphans = wait_for(lambda: workers(head) or not killed.is_alive(), every=0.05)
    killed.kill()
    killed.join()
    wait_for(lambda: not alive(orphans), timeout=30, every=0.1)
    driver = start(*command)
    victims = wait_for(lambda: workers(head) or driver.poll() is not None, every=0.05)
    kill(victims[:1])
    done = finish(driver)

    assert done.status == 0, done.stderr
    assert "workers that died and were replaced: 1" in done.stdout
    assert "unexpected" not in done.stdout + done.stderr, "Ray's own words about a death"
    assert_complete(out, PROMPTS)
    assert_same_run(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_ray_run_that_is_ended_leaves_no_process_of_its_own_cluster(
    number: signal.Signals, job: Command, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    driver = start(*job, "--out", out, "--executor", "ray")
    wait_for(lambda: count_commits(out) >= 2 or driver.poll() is not None)
    started = descendants(driver.pid)
    assert workers(driver.pid)
    # When its node is killed under it, Ray's own agent talks to nobody for a minute before it gives up.
    agents = [process for process in started if number is signal.SIGKILL and is_agent(process)]

    ended = interrupt(driver, number)

    try:
        wait_for(lambda: set(alive(started)) <= set(agents), timeout=30, every=0.1)
    finally:
        kill(started)
    if number is not signal.SIGKILL:
        assert ended.status == 3
        assert ended.stderr.splitlines()[-1].startswith("backlens: interrupted")
        assert "Traceback" not in ended.stderr
    done = called(*job, "--out", out, "--executor", "local")  # the executor is no part of what a run is
    assert done.status == 0, done.stderr
    assert_complete(out, PROMPTS)
    assert_same_run(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("instant", ["while it starts", "between commits"])
def test_a_local_run_that_is_interrupted_says_so_and_goes_on_later(
    instant: str, number: signal.Signals, job: Command, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    driver = start(*job, "--out", out, "--executor", "local")
    if instant == "between commits":
        wait_for(lambda: count_commits(out) >= 2 or driver.poll() is not None)
    else:
        time.sleep(1.5)

    ended = interrupt(driver, number)

    assert ended.status == 3
    assert ended.stderr.splitlines()[-1] == (
        "backlens: interrupted; the same command goes on from what is committed"
    )
    assert "Traceback" not in ended.stderr
    done = called(*job, "--out", out, "--executor", "local")
    assert done.status == 0, done.stderr
    assert_complete(out, PROMPTS)
    assert_same_run(out, uninterrupted)


def test_a_second_run_on_a_directory_in_use_is_refused_and_the_first_goes_on(
    job: Command, uninterrupted: Path, tmp_path: Path, forked: Any
) -> None:
    command = (*job, "--out", tmp_path / "out", "--executor", "local")
    first = forked(*command)
    wait_for(lambda: count_commits(tmp_path / "out") >= 2)

    began = time.monotonic()
    second = called(*command)

    assert second.status == 2
    assert "is in use by another backlens run" in error_line(second)
    assert f"pid {first.pid}" in error_line(second)
    assert time.monotonic() - began < 3
    assert first.is_alive()
    first.join(60)
    assert first.exitcode == 0
    assert_complete(tmp_path / "out", PROMPTS)
    assert_same_run(tmp_path / "out", uninterrupted)


def test_a_finished_run_has_nothing_to_do_and_changes_no_file(job: Command, uninterrupted: Path) -> None:
    before = snapshot(uninterrupted)

    again = called(*job, "--out", uninterrupted, "--executor", "local")

    assert again.status == 0
    assert "nothing to do" in again.stdout
    after = snapshot(uninterrupted)
    assert contents(after) == contents(before)
    tables = {name for name in before if name.endswith(".parquet") or name.startswith("_commits/")}
    assert {name: after[name] for name in tables} == {name: before[name] for name in tables}


@pytest.mark.parametrize(
    ("option", "value", "before", "now"),
    [
        ("--top-k", 6, "top-k 5", "top-k 6"),
        ("--neurons", 5, "neurons 4", "neurons 5"),
        ("--scaling", "unit", "scaling raw", "scaling unit"),
        ("--positions", "last", "positions all", "positions last"),
        ("--layers", "0-1", "layers 0,1,2", "layers 0,1"),
        ("--modules", "mlp.down", "modules mlp.up,mlp.down", "modules mlp.down"),
        ("--target-mode", "all", "target-mode first", "target-mode all"),
        ("--dtype", "bfloat16", "dtype auto", "dtype bfloat16"),
        ("--attention", "fast", "attention exact", "attention fast"),
        ("--prepend-bos", "false", "prepend-bos auto", "prepend-bos false"),
        ("--limit", 7, "number of prompts 40", "number of prompts 7"),
        ("--shard-prompts", 2, "shard-prompts 1", "shard-prompts 2"),
    ],
)
def test_another_option_on_an_old_directory_is_refused_with_both_values(
    option: str, value: object, before: str, now: str, job: Command, uninterrupted: Path
) -> None:
    line = _refusal((*_without(job, option), option, value), uninterrupted)
    made, _, given = line.partition(", this run has ")
    assert before in made
    assert now in given


def test_changed_prompts_on_an_old_directory_are_refused(
    job: Command, uninterrupted: Path, tmp_path: Path
) -> None:
    records = some_prompts(PROMPTS, longest=12)
    records[-1]["target"] += "!"
    changed = write_jsonl(tmp_path / "many.jsonl", records)
    assert "prompts content" in _refusal((*_without(job, "--prompts"), "--prompts", changed), uninterrupted)


def test_the_same_prompts_in_another_file_are_accepted(job: Command, run: Path, tmp_path: Path) -> None:
    moved = write_jsonl(tmp_path / "moved.jsonl", some_prompts(PROMPTS, longest=12))
    again = called(*_without(job, "--prompts"), "--prompts", moved, "--out", run, "--executor", "local")
    assert again.status == 0
    assert "nothing to do" in again.stdout


def test_changed_weights_on_an_old_directory_are_refused(
    job: Command, gpt2: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(gpt2, tmp_path / "model")
    weights = load_file(changed / "model.safetensors")
    next(iter(weights.values())).flatten()[0] += 1e-3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert "model weights" in _refusal((*_without(job, "--model"), "--model", changed), uninterrupted)


def _refusal(command: Command, out: Path) -> str:
    """The line that refuses the command; nothing in the directory has changed."""
    before = snapshot(out)
    refused = called(*command, "--out", out, "--executor", "local")
    assert refused.status == 2
    assert snapshot(out) == before
    return error_line(refused)


def _without(command: Command, option: str) -> Command:
    if option not in command:
        return command
    place = command.index(option)
    return (*command[:place], *command[place + 2 :])
