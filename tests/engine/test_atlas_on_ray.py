"""An atlas that Ray's workers built is the one that a single process builds, and a killed build is gone on with."""

import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from backlens.atlas.manifest import Manifest, find_manifest
from backlens.store.directory import Directory
from tests.atlas.test_questions import assert_same
from tests.engine.command import backlens, called, start, wait_for

OPTIONS = ("--neurons", "4", "--executor", "local")


@pytest.fixture(scope="module")
def runs(gpt2: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run twice."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        files = ("--model", gpt2, "--prompts", prompts_file, "--out", folder / name)
        assert called("run", *files, *OPTIONS).status == 0
    return folder / "one", folder / "two"


def manifest(out: Path) -> Manifest:
    found = find_manifest(Directory.at(out))
    assert found is not None
    return found


def assert_same_atlas(one: Path, two: Path) -> None:
    """Every row, means to rounding: threads may add up in another order."""
    left, right = manifest(one), manifest(two)
    assert left.rows == right.rows
    assert all(left.rows.values()), left.rows
    for table in left.files:
        rows = [
            pq.read_table([out / file.path for file in found.files[table]]).to_pylist()
            for out, found in ((one, left), (two, right))
        ]
        assert_same(*rows)


@pytest.mark.slow
def test_ray_builds_the_same_atlas(runs: tuple[Path, Path], cluster: tuple[str, int]):
    alone, spread = runs
    assert called("atlas", alone).status == 0
    finished = backlens("atlas", spread, "--executor", "ray", "--address", cluster[0])
    assert finished.status == 0, finished.stderr
    assert_same_atlas(alone, spread)


@pytest.mark.slow
def test_a_build_that_is_killed_is_gone_on_with(runs: tuple[Path, Path]):
    whole, killed = runs
    assert called("atlas", whole).status == 0
    for file in (killed / "atlas").rglob("*"):
        if file.is_file():
            file.unlink()
    process = start("atlas", killed)
    wait_for(lambda: list((killed / "atlas" / "_pieces").glob("layer-*.json")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert find_manifest(Directory.at(killed)) is None
    again = called("atlas", killed)
    assert again.status == 0
    assert "(done before)" in again.stderr
    assert_same_atlas(whole, killed)
    assert not list((killed / "atlas").rglob("*.tmp"))
