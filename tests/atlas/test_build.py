"""What `backlens atlas` leaves: sorted files that only the manifest makes count, however a build ended."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from backlens.atlas import Atlas, build
from backlens.atlas import pieces as piece
from backlens.atlas.build import BuildOptions, build_atlas
from backlens.atlas.manifest import CutOff, find_manifest
from backlens.atlas.tables import ATLAS_TABLES
from backlens.cli.main import call
from backlens.errors import BacklensError
from backlens.store.commit import commit_shard
from backlens.store.directory import Directory
from tests.store.examples import ExampleRun, arrow, example_run, random_rows, start_run


class Watcher:
    """Remembers what a build says."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.said = ""
        self.pieces: list[tuple[str, bool]] = []
        self.stop_after = stop_after

    def planned(self, text: str, pieces: int) -> None:
        self.said = text

    def finished(self, piece: str, pieces: int, kept: bool) -> None:
        self.pieces.append((piece, kept))
        if len(self.pieces) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def example(tmp_path: Path) -> ExampleRun:
    return example_run(Directory.at(tmp_path))


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> ExampleRun:
    """A run that is only asked."""
    return example_run(Directory.at(tmp_path_factory.mktemp("run")))


def null_last(row: dict[str, Any], names: tuple[str, ...]) -> list[tuple]:
    return [(row[name] is None, row[name] or 0) if row[name] != "" else (False, "") for name in names]


@pytest.mark.parametrize("experts", [False, True])
def test_files_are_as_declared_sorted_and_hold_every_row(
    tmp_path: Path, experts: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build, "TOKEN_PIECE_ROWS", 200)
    monkeypatch.setattr(build, "PROMPT_PIECE_ROWS", 20)
    example_run(Directory.at(tmp_path), experts=experts)
    manifest = build_atlas(str(tmp_path))
    assert len(manifest.files["token_topk"]) > 2
    assert len(manifest.files["prompt_tokens"]) == 2
    for name, files in manifest.files.items():
        table = ATLAS_TABLES[name]
        rows = []
        for file in files:
            opened = pq.ParquetFile(tmp_path / file.path)
            assert opened.schema_arrow.equals(table.schema, check_metadata=True)
            assert opened.metadata.row_group(0).column(0).compression == "ZSTD"
            assert len(opened.metadata.row_group(0).sorting_columns) == len(table.sorted_by)
            assert opened.metadata.num_rows == file.rows
            rows += opened.read().to_pylist()
        assert rows == sorted(rows, key=lambda row: null_last(row, table.sorted_by))
        assert Atlas(tmp_path.as_posix()).sql(f"SELECT count(*) AS n FROM {name}").to_pylist() == [
            {"n": len(rows)}
        ]
    assert manifest.rows["neuron_topk"] == manifest.rows["token_topk"]


def test_row_groups_are_of_the_size_look_ups_want(example: ExampleRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(piece, "ROW_GROUP_ROWS", 30)
    monkeypatch.setattr(piece, "ROW_GROUPS", {"prompt_neurons": 10})
    files = build_atlas(example.out).files
    for table, rows in (("neuron_topk", 30), ("prompt_neurons", 10)):
        metadata = pq.ParquetFile(Path(example.out) / files[table][0].path).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        assert set(sizes[:-1]) == {rows}


def test_a_second_call_has_nothing_to_do(example: ExampleRun):
    first = build_atlas(example.out)
    watcher = Watcher()
    assert build_atlas(example.out, watcher) == first
    assert watcher.pieces == []


@pytest.mark.parametrize("stop_after", [1, 4, 5])
def test_a_stopped_build_counts_for_nothing_and_is_gone_on_with(example: ExampleRun, stop_after: int):
    with pytest.raises(KeyboardInterrupt):
        build_atlas(example.out, Watcher(stop_after))
    assert find_manifest(Directory.at(example.out)) is None
    assert not Atlas(example.out).snapshot.files.get("neuron_topk")
    watcher = Watcher()
    build_atlas(example.out, watcher)
    assert [kept for _, kept in watcher.pieces] == [True] * stop_after + [False] * (5 - stop_after)
    assert Atlas(example.out).snapshot.is_current


def test_a_piece_whose_file_is_damaged_is_built_again(example: ExampleRun):
    with pytest.raises(KeyboardInterrupt):
        build_atlas(example.out, Watcher(2))
    damaged = next(Path(example.out).glob("atlas/neuron_topk/layer-000000-*"))
    damaged.write_bytes(b"short")
    watcher = Watcher()
    build_atlas(example.out, watcher)
    assert watcher.pieces[:2] == [("layer-000001", True), ("layer-000000", False)]


def test_what_a_killed_build_left_is_removed(example: ExampleRun):
    folder = Path(example.out) / "atlas"
    (folder / ".spill-x.tmp").mkdir(parents=True)
    (folder / "neuron_topk").mkdir()
    (folder / "neuron_topk" / ".layer.parquet.1.tmp").write_bytes(b"half")
    build_atlas(example.out)
    assert not list(folder.rglob("*.tmp"))


def test_an_atlas_that_the_run_left_behind_is_not_read_and_is_built_again(tmp_path: Path):
    example_run(Directory.at(tmp_path), shards=2, committed=1)
    build_atlas(str(tmp_path))
    before = Atlas(str(tmp_path))
    assert before.snapshot.is_current
    commit_shard(
        Directory.at(tmp_path),
        1,
        arrow(random_rows(random.Random(9), range(4, 8))),
        first_prompt=4,
        prompts=4,
    )
    stale = Atlas(str(tmp_path))
    assert not stale.snapshot.is_current
    assert stale.note is not None
    assert "of 1 shards and no longer the run's" in stale.note
    fresh = stale.specific_neurons(1000, min_prompts=1)
    watcher = Watcher()
    manifest = build_atlas(str(tmp_path), watcher)
    assert "replaces one of 1 shards" in watcher.said
    assert Atlas(str(tmp_path)).note is None
    assert Atlas(str(tmp_path)).specific_neurons(1000, min_prompts=1).num_rows == fresh.num_rows
    listed = {file.path for files in manifest.files.values() for file in files}
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("atlas/*/*.parquet")} == listed


def test_the_files_of_an_atlas_in_use_stay_until_the_next_one_is_whole(tmp_path: Path):
    example_run(Directory.at(tmp_path), shards=2, committed=1)
    build_atlas(str(tmp_path))
    reader = Atlas(str(tmp_path))
    answer = reader.token_neurons(" Paris")
    commit_shard(
        Directory.at(tmp_path),
        1,
        arrow(random_rows(random.Random(9), range(4, 8))),
        first_prompt=4,
        prompts=4,
    )
    with pytest.raises(KeyboardInterrupt):
        build_atlas(str(tmp_path), Watcher(3))
    assert reader.token_neurons(" Paris") == answer


def test_a_manifest_that_cannot_be_read_is_as_good_as_none(example: ExampleRun):
    build_atlas(example.out)
    path = Path(example.out) / "atlas" / "manifest.json"
    content = json.loads(path.read_text())
    for other in ("{", json.dumps({**content, "atlas_version": 99}), json.dumps({**content, "new": 1})):
        path.write_text(other)
        assert Atlas(example.out).snapshot.manifest is None
    assert build_atlas(example.out).source == content["source"]


def test_an_atlas_of_another_version_is_not_read_and_is_said_to_be(example: ExampleRun):
    build_atlas(example.out)
    path = Path(example.out) / "atlas" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "atlas_version": 1}))
    old = Atlas(example.out)
    assert f"written by another version and is not read; `backlens atlas {example.out}`" in str(old.note)
    answer = old.by_prompt(1)
    build_atlas(example.out)
    assert Atlas(example.out).note is None
    assert Atlas(example.out).by_prompt(1) == answer


def test_runs_on_object_stores_have_their_atlas_beside_them(tmp_path: Path):
    url = f"memory://{tmp_path.name}"
    example_run(Directory.at(url))
    build_atlas(url)
    atlas = Atlas(url)
    assert atlas.snapshot.is_current
    assert atlas.token_neurons(" Paris").num_rows > 0


def test_a_run_without_a_shard_has_no_atlas(tmp_path: Path):
    start_run(Directory.at(tmp_path))
    with pytest.raises(BacklensError, match="has no committed shard yet"):
        build_atlas(str(tmp_path))


def test_a_memory_limit_that_is_none_is_refused(example: ExampleRun):
    with pytest.raises(BacklensError, match="--memory lots: write it as 2GB"):
        build_atlas(example.out, options=BuildOptions(memory="lots"))


@pytest.mark.parametrize(
    ("neurons", "said"),
    [
        (16, "the 16 strongest neurons per prompt, layer and module; one that is missing .* not zero"),
        (-1, "every neuron is kept"),
        (0, "no neurons are kept"),
        (None, "not zero"),
    ],
)
def test_the_cut_off_is_said(neurons: int | None, said: str):
    assert re.search(said, str(CutOff(neurons, 10)))


def test_the_command_builds_and_says_what_there_is(example: ExampleRun, capsys: pytest.CaptureFixture[str]):
    assert call(["atlas", example.out]) == 0
    printed = capsys.readouterr()
    assert "5 of 5 pieces" in printed.err
    assert "neuron_summary" in printed.out
    assert "not zero" in printed.out
    assert call(["atlas", example.out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--token", " Paris", "--show", "neurons"],
        ["--token", " Paris", "--show", "layers", "--json"],
        ["--neuron", "1.mlp.up.2", "--show", "tokens"],
        ["--neuron", "1.mlp.up.2", "--show", "summary"],
        ["--neuron", "1.mlp.up.2", "--show", "similar"],
        ["--prompt", "1", "--show", "neurons", "--layer", "1"],
        ["--prompt", "1", "--show", "ranks"],
        ["--prompt", "1", "--show", "tokens"],
        ["--prompt", "1", "--compare", "2"],
        ["--show", "specific", "--min-prompts", "1"],
        ["--show", "tokens", "--module", "mlp.up"],
        ["--show", "curves", "--csv"],
        ["--show", "groups", "--by", "row"],
        ["--show", "coverage"],
    ],
)
def test_every_question_has_its_words_on_the_command_line(
    standing: ExampleRun, capsys: pytest.CaptureFixture[str], options: list[str]
):
    assert call(["query", standing.out, *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--show", "specfic"], "of a run there are specific, .*did you mean specific"),
        (["--token", " Paris", "--show", "tokens"], "of a token there are places, neurons, layers"),
        (["--sql", "SELECT 1", "--show", "tokens"], "does not go with --sql"),
        (["--token", " Paris", "--compare", "2"], "compares two prompts"),
        (["--prompt", "1", "--compare", "two"], "another prompt's number"),
        (["--prompt", "1", "--show", "ranks", "--module", "mlp.dwn"], "did you mean mlp.down"),
        ([], "or of the whole run --show specific"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_status_2(
    standing: ExampleRun, capsys: pytest.CaptureFixture[str], options: list[str], said: str
):
    assert call(["query", standing.out, *options]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert error.count("\n") == 1
