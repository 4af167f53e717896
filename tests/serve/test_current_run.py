"""A server that goes on while the run's atlas is built again, or is taken away."""

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from backlens.atlas import Atlas
from backlens.atlas.build import build_atlas
from backlens.serve import app as explorer
from backlens.serve.app import make_app
from backlens.serve.page import Served
from backlens.store.commit import commit_shard
from backlens.store.directory import Directory
from tests.store.examples import arrow, example_run, random_rows

AN_HOUR = 3600.0


@contextmanager
def a_server_of_one_shard(out: Path) -> Iterator[TestClient]:
    """A client of a run that has committed one of its two shards."""
    example_run(Directory.at(out), shards=2, committed=1)
    build_atlas(str(out))
    app = make_app(Served.of(Atlas(str(out)), str(out)), ["testserver"])
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def commit_the_other(out: Path) -> None:
    rows = arrow(random_rows(random.Random(9), range(4, 8)))
    commit_shard(Directory.at(out), 1, rows, first_prompt=4, prompts=4)


@pytest.mark.parametrize("check_every", [0.0, AN_HOUR])
def test_a_server_goes_on_with_an_atlas_that_is_built_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_every: float
):
    """Also if it has just looked, and finds out as the files of the atlas before are gone."""
    with a_server_of_one_shard(tmp_path) as client:
        monkeypatch.setattr(explorer, "CHECK_EVERY", check_every)
        assert client.get("/prompt/6").status_code == 404
        commit_the_other(tmp_path)
        assert client.get("/prompt/1").status_code == 200
        build_atlas(str(tmp_path))
        for address in ("/prompt/1", "/prompt/6", "/token?text=%20Paris", "/layers"):
            assert client.get(address).status_code == 200, address
        said = client.get("/index.json").json()
        assert said["shards"] == 2
        assert max(row["prompt_id"] for row in said["tables"]["prompts"]) == 7


def test_a_server_whose_atlas_is_taken_away_says_so_until_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(explorer, "CHECK_EVERY", 0.0)
    with a_server_of_one_shard(tmp_path) as client:
        shutil.rmtree(tmp_path / "atlas")
        refused = client.get("/prompt/1.json")
        assert refused.status_code == 503
        assert f"backlens atlas {tmp_path}" in refused.text
        assert refused.text.count("\n") == 1
        build_atlas(str(tmp_path))
        assert client.get("/prompt/1.json").status_code == 200
