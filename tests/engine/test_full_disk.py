"""A run on a disk that fills up stops with one line, damages nothing, and goes on once there is room."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.command import assert_complete, assert_same_run, backlens, called, commits, write_jsonl
from tests.engine.conftest import some_prompts

PROMPTS = 24
DISK = 4 * 2**20
ROOM = 500_000
"""Enough to begin with, and for some of the shards."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount the small disk that this test fills")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def command(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    prompts = write_jsonl(tmp_path_factory.mktemp("prompts") / "p.jsonl", some_prompts(PROMPTS, longest=12))
    return ("run", "--model", gpt2, "--prompts", prompts, "--shard-prompts", 1, "--neurons", 4)


@pytest.fixture(scope="module")
def roomy(command: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run where there is room."""
    out = tmp_path_factory.mktemp("runs") / "roomy"
    assert called(*command, "--out", out, "--executor", "local").status == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(
    executor: str,
    disk: Path,
    command: tuple[object, ...],
    roomy: Path,
    cluster: tuple[str, int],
) -> None:
    ballast, out = disk / "ballast", disk / "run"
    ballast.write_bytes(bytes(DISK - ROOM))
    workers = ("--address", cluster[0]) if executor == "ray" else ()

    stopped = backlens(*command, "--out", out, "--executor", executor, *workers)

    assert stopped.status == 3, stopped.stderr
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"backlens: out: cannot write {out}/"), stopped.stderr
    assert "No space left on device" in last
    assert last.endswith(f"; make room on the disk of {out} and run the same command again")
    assert "Traceback" not in stopped.stderr
    done_before = commits(out)
    assert 0 < len(done_before) < PROMPTS

    ballast.unlink()
    resumed = called(*command, "--out", out, "--executor", "local")

    assert resumed.status == 0, resumed.stderr
    assert f"{len(done_before)} of them are done already" in resumed.stderr
    assert {number: commits(out)[number] for number in done_before} == done_before
    assert_complete(out, PROMPTS)
    assert_same_run(out, roomy)


def test_a_disk_without_any_room_stops_a_run_before_it_begins(
    disk: Path, command: tuple[object, ...]
) -> None:
    out = disk / "run"
    with pytest.raises(OSError, match="No space left"):
        (disk / "ballast").write_bytes(bytes(2 * DISK))
    stopped = called(*command, "--out", out, "--executor", "local")
    assert stopped.status == 3
    assert "No space left on device" in stopped.stderr
    assert len(stopped.stderr.splitlines()) == 1
