"""A partial copy, or one damaged file: commands that need the file name it, and others work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from backlens.atlas.build import BuildOptions, build_atlas
from backlens.store.directory import Directory
from tests.engine.command import called, error_line
from tests.store.examples import example_run

FIRST, SECOND = "part-000000.parquet", "part-000001.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    example_run(Directory.at(out))
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


QUESTIONS = {
    "prompt 1": ("query", "--prompt", "1"),
    "prompt 5": ("query", "--prompt", "5"),
    "neuron": ("query", "--neuron", "0.mlp.up.1"),
    "curves": ("query", "--show", "curves"),
    "groups": ("query", "--show", "groups"),
    "tokens": ("query", "--sql", "SELECT count(*) FROM tokens"),
    "neurons": ("query", "--sql", "SELECT max(neuron) FROM neurons WHERE layer = 0"),
    "failures": ("query", "--sql", "SELECT * FROM failures"),
    "factors": ("query", "--sql", "SELECT count(*) FROM factors"),
    "figure": ("plot", "--prompt", "1", "--to", "x.svg"),
}
DAMAGE: dict[str, tuple[Callable[[Path], object], str, set[str]]] = {
    "no neurons": (
        lambda out: shutil.rmtree(out / "neurons"),
        f"neurons/{FIRST}: missing",
        {"neuron", "neurons"},
    ),
    "no factors": (lambda out: shutil.rmtree(out / "factors"), f"factors/{FIRST}: missing", {"factors"}),
    "no failures": (lambda out: shutil.rmtree(out / "failures"), f"failures/{FIRST}: missing", {"failures"}),
    "no vocab": (
        lambda out: shutil.rmtree(out / "vocab"),
        "vocab/part-0.parquet: missing",
        {"prompt 1", "prompt 5", "neuron", "figure"},
    ),
    "an empty file": (
        lambda out: (out / "tokens" / SECOND).write_bytes(b""),
        f"tokens/{SECOND}: 0 bytes",
        {"prompt 5", "curves", "tokens"},
    ),
    "a file that is cut short": (
        lambda out: cut(out / "tokens" / FIRST),
        f"tokens/{FIRST}: ",
        {"prompt 1", "curves", "tokens", "figure"},
    ),
    "a missing file": (
        lambda out: (out / "prompts" / SECOND).unlink(),
        f"prompts/{SECOND}: missing",
        {"prompt 5", "neuron", "curves", "groups"},
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_question_needs_only_the_tables_that_it_reads(
    damage: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    harm, line, stopped = DAMAGE[damage]
    harm(copy)
    for name, (command, *words) in QUESTIONS.items():
        done = called(command, copy, *words)
        assert done.status == (2 if name in stopped else 0), (name, done.stderr)
        if name in stopped:
            assert f"{copy}/{line}" in error_line(done)
    status = json.loads(called("status", copy, "--json").stdout)
    assert f"{copy}/{line}" in status["missing"][0]
    assert line.split(":")[0] in called("status", copy).stdout
    verified = called("verify", copy)
    assert (verified.status, verified.stdout.count("\n")) == (1, 1)
    assert f"{copy}/{line}" in verified.stdout


def test_an_atlas_is_not_built_of_part_of_the_tables(copy: Path):
    (copy / "neurons" / SECOND).unlink()
    refused = called("atlas", copy, "--weights", "none")
    assert refused.status == 2
    assert f"{copy}/neurons/{SECOND}: missing" in error_line(refused)
    assert not (copy / "atlas" / "manifest.json").exists()


def test_a_lost_file_of_the_atlas_is_named(copy: Path):
    build_atlas(str(copy), options=BuildOptions(weights="none"))
    shutil.rmtree(copy / "atlas" / "neuron_summary")
    refused = called("query", copy, "--show", "specific")
    assert refused.status == 2
    assert f"{copy}/atlas/neuron_summary/" in error_line(refused)
    assert "backlens atlas" in error_line(refused)
    assert called("query", copy, "--show", "curves").status == 0


def test_verify_compares_contents_and_stops_at_the_first_loss(copy: Path):
    assert called("verify", copy).status == 0
    change(copy / "layers" / FIRST)
    change(copy / "tokens" / SECOND)
    first = called("verify", copy)
    assert (first.status, first.stdout.count("\n")) == (1, 1)
    assert f"layers/{FIRST}: the content is not what was written" in first.stdout
    every = json.loads(called("verify", copy, "--every", "--json").stdout)
    assert [line.split(":")[0] for line in every["losses"]] == [
        f"{copy}/layers/{FIRST}",
        f"{copy}/tokens/{SECOND}",
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shard": 1}', "null"])
def test_a_damaged_record_is_a_loss(content: str, copy: Path):
    (copy / "_commits" / "000001.json").write_text(content)
    verified = called("verify", copy)
    assert (verified.status, verified.stdout.count("\n")) == (1, 1)
    assert "_commits/000001.json: not a shard record" in verified.stdout
    status = json.loads(called("status", copy, "--json").stdout)
    assert (status["shards_committed"], status["state"]) == (1, "stopped")
    assert "_commits/000001.json: not a shard record" in status["missing"][0]
    refused = called("query", copy, "--prompt", "1")
    assert (refused.status, "_commits/000001.json" in error_line(refused)) == (2, True)


def test_a_record_that_is_missing_from_a_finished_run_is_a_loss(copy: Path):
    (copy / "_commits" / "000001.json").unlink()
    assert "_commits/000001.json: missing" in called("verify", copy).stdout
    assert "_commits/000001.json: missing" in called("status", copy).stdout


@pytest.mark.parametrize(
    "content",
    ["", "null", '{"plan": {"prompts": "a", "shards": 1, "shard_prompts": 1}}', '{"schema_version": 99}'],
)
def test_a_damaged_run_json_is_named(content: str, copy: Path):
    if content.startswith('{"'):
        record = json.loads((copy / "run.json").read_text()) | json.loads(content)
        content = json.dumps(record)
    (copy / "run.json").write_text(content)
    for words in (("query", copy, "--prompt", "1"), ("status", copy), ("verify", copy), ("atlas", copy)):
        refused = called(*words)
        assert (refused.status, f"{copy}/run.json" in error_line(refused)) == (2, True)
