"""Any name of a directory works: none is read as a pattern, a partition or a chain of file systems."""

import os
from pathlib import Path

import pytest

from backlens.atlas import Atlas
from backlens.atlas.build import BuildOptions, build_atlas
from backlens.store.directory import Directory
from backlens.store.status import read_table, run_status, verify
from tests.store.examples import example_run

NAMES = [
    "layers=[0,1]",
    "exp?",
    "a*b",
    "**",
    "{x}",
    "[!e]xp1",
    "[[a]]",
    "a\\*b",
    "layer=3/module=mlp.up",
    "a::b",
    "it's #1, 100%",
    "~x",
]


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_read_by_its_own_name_whatever_lies_beside(place: str, name: str, tmp_path: Path):
    if place == "memory" and "::" in name:
        pytest.skip("a URL with :: is a chain of file systems")
    root = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}"
    for other in ("exp1", "aXb", "a", "\\a", "layers=0"):  # what the names match, read as patterns
        example_run(Directory.at(f"{root}/{other}"), shards=1, seed=1)
    directory = Directory.at(f"{root}/{name}")
    example = example_run(directory, shards=2, seed=2)
    wanted = sorted((row["layer"], row["module"], row["position"]) for row in example.rows["tokens"])

    assert read_table(directory, "tokens").num_rows == len(wanted)
    atlas = Atlas(directory)
    found = atlas.sql("SELECT layer, module, position FROM tokens ORDER BY ALL", limit=len(wanted) + 1)
    assert [tuple(row.values()) for row in found.to_pylist()] == wanted
    assert "column" in atlas.sql("DESCRIBE tokens").column_names[0]
    assert atlas.by_prompt(1).num_rows == sum(row["prompt_id"] == 1 for row in example.rows["tokens"])
    assert run_status(directory.root).shards_committed == 2
    assert verify(directory.root).losses == []


@pytest.mark.parametrize("place", ["local", "memory"])
def test_an_atlas_is_built_under_such_a_name(place: str, tmp_path: Path):
    root = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}"
    example_run(Directory.at(f"{root}/aXb?0"), seed=1)
    directory = Directory.at(f"{root}/a*b[?]0")
    example_run(directory, seed=2)
    before = Atlas(directory).coverage().to_pylist()
    build_atlas(directory, options=BuildOptions(weights="none"))
    assert Atlas(directory).snapshot.is_current
    assert Atlas(directory).coverage().to_pylist() == before


def test_a_folder_named_like_a_partition_adds_and_changes_no_column(tmp_path: Path):
    directory = Directory.at(tmp_path / "layer=7" / "score=x")
    example = example_run(directory, shards=1)
    layers = {row["layer"] for row in example.rows["tokens"]}
    assert set(read_table(directory, "tokens")["layer"].to_pylist()) == layers
    atlas = Atlas(directory)
    assert set(atlas.sql("SELECT layer FROM tokens")["layer"].to_pylist()) == layers
    plain = Atlas(example_run(Directory.at(tmp_path / "plain"), shards=1).out)
    described = "SELECT column_name, column_type FROM (DESCRIBE tokens)"
    assert atlas.sql(described) == plain.sql(described)


def test_the_link_that_stands_in_for_a_name_is_gone_with_the_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(links))
    example = example_run(Directory.at(tmp_path / "a*b"), shards=1)
    atlas = Atlas(example.out)
    assert atlas.coverage().num_rows
    assert len(os.listdir(links)) == 1
    del atlas
    assert os.listdir(links) == []
