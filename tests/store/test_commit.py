"""A shard is complete or absent, whenever the process that writes it dies."""

import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from backlens.errors import BacklensError
from backlens.store.commit import SHARD_TABLES, commit_shard, committed, find_commit
from backlens.store.directory import Directory, is_temporary
from backlens.store.status import every_loss, read_table, table_files
from backlens.store.tables import TABLES, factors_table
from tests.store.examples import arrow, random_rows

# One process imports everything and forks a child for each instant; SIGKILL ends the child at that instant.
DYING_WRITERS = """
import os, signal, sys
import pyarrow.parquet as pq
from backlens.store.commit import commit_shard
from backlens.store.directory import Directory
from tests.store.test_commit import shard_tables

def dying_at(instant, function, passed):
    def wrapped(*arguments, **options):
        for after in (False, True):
            if after:
                result = function(*arguments, **options)
            passed[0] += 1
            if passed[0] == instant:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def commit_until(instant, out):
    passed = [0]
    for module, name in ((os, "replace"), (os, "fsync"), (pq.ParquetWriter, "write_table")):
        setattr(module, name, dying_at(instant, getattr(module, name), passed))
    commit_shard(Directory.at(out), 7, tables, first_prompt=28, prompts=4)

tables = shard_tables()
instant = 0
while True:
    instant += 1
    child = os.fork()
    if child == 0:
        commit_until(instant, os.path.join(sys.argv[1], str(instant)))
        os._exit(0)
    if os.WIFEXITED(status := os.waitpid(child, 0)[1]):
        sys.exit(os.WEXITSTATUS(status))
"""

RACING_WRITERS = """
import sys
from backlens.store.commit import commit_shard
from backlens.store.directory import Directory
from tests.store.test_commit import shard_tables

tables = shard_tables(seed=int(sys.argv[2]))
sys.stdin.read()
stats = {"seed": int(sys.argv[2])}
commit_shard(Directory.at(sys.argv[1]), 7, tables, first_prompt=28, prompts=4, stats=stats)
"""


def shard_tables(seed: int = 0) -> dict[str, pa.Table]:
    return arrow(random_rows(random.Random(seed), range(28, 32)))


def commit(directory: Directory, seed: int = 0, **options):
    return commit_shard(directory, 7, shard_tables(seed), first_prompt=28, prompts=4, **options)


def contents(directory: Directory) -> dict[str, list]:
    return {name: read_table(directory, name).to_pylist() for name in (*SHARD_TABLES, "factors")}


@pytest.fixture(params=["local", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    return Directory.at(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_a_crash_at_any_instant_leaves_all_of_a_shard_or_nothing(tmp_path: Path):
    subprocess.run([sys.executable, "-c", DYING_WRITERS, str(tmp_path)], check=True)
    undisturbed = Directory.at(tmp_path / "undisturbed")
    commit(undisturbed)
    wanted = contents(undisturbed)
    instants = sorted(tmp_path.glob("[0-9]*"), key=lambda path: int(path.name))
    seen = []
    for path in instants:
        found = Directory.at(path)
        seen.append(len(committed(found)))
        assert contents(found) == (wanted if seen[-1] else {name: [] for name in wanted})
        assert lost(found) == []
        found.remove_leftovers()
        commit(found)
        assert contents(found) == wanted
        assert lost(found) == []
        assert not any(is_temporary(file.name) for file in path.rglob("*"))
    assert seen == sorted(seen)
    assert {*seen} == {0, 1}  # the instants lie on both sides of the commit
    assert len(seen) > 40


def lost(directory: Directory) -> list[str]:
    """One line per file that is missing or changed."""
    return [str(loss) for loss in every_loss(directory, list(committed(directory).values()))]


def test_a_committed_shard_is_never_replaced(directory: Directory):
    first = commit(directory, stats={"seconds": 1.5})
    before = contents(directory)
    again = commit(directory, seed=1)
    assert again == first == find_commit(directory, 7)
    assert contents(directory) == before
    assert lost(directory) == []
    assert not any(is_temporary(name) for name in directory.names("layers"))


def test_of_racing_writers_one_commits(tmp_path: Path):
    command = [sys.executable, "-c", RACING_WRITERS, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE) for seed in range(3)]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    directory = Directory.at(tmp_path)
    assert lost(directory) == []
    winner = Directory.at(tmp_path / "winner")
    commit(winner, seed=int(committed(directory)[7].stats["seed"]))
    assert contents(directory) == contents(winner)


def test_a_record_survives_json(directory: Directory):
    record = commit(directory, stats={"forward_seconds": 0.5}, versions={"torch": "2.9"})
    assert committed(directory) == {7: record}
    assert (record.first_prompt, record.prompts) == (28, 4)
    assert record.files["layers"].path == "layers/part-000007.parquet"
    assert directory.exists("_commits/000007.json")
    assert record.rows["prompts"] == 4


def test_tables_without_rows_can_be_read(directory: Directory):
    commit_shard(directory, 0, {}, first_prompt=0, prompts=0)
    assert read_table(directory, "neurons").schema.equals(TABLES["neurons"].schema)
    assert directory.names("factors") == []
    assert read_table(directory, "factors").num_rows == 0


def test_factors_keep_their_value_type(directory: Directory):
    half = factors_table(pa.float16()).schema
    rows = shard_tables()["factors"].cast(half)
    commit_shard(directory, 0, {"factors": rows}, first_prompt=0, prompts=4)
    assert read_table(directory, "factors").schema.equals(half)


def test_readers_go_by_the_records_and_not_by_the_files(tmp_path: Path):
    directory = Directory.at(tmp_path)
    commit(directory)
    (tmp_path / "layers" / "part-000008.parquet").write_bytes(b"from a run that was killed")
    (tmp_path / "layers" / ".part-000009.parquet.1234.tmp").write_bytes(b"")
    assert table_files(directory, "layers") == [str(tmp_path / "layers" / "part-000007.parquet")]
    assert read_table(directory, "layers", columns=["rank"]).column_names == ["rank"]


def test_verify_finds_what_was_damaged(tmp_path: Path):
    directory = Directory.at(tmp_path)
    commit(directory)
    (tmp_path / "layers" / "part-000007.parquet").unlink()
    with open(tmp_path / "tokens" / "part-000007.parquet", "ab") as file:
        file.write(b"more")
    neurons = tmp_path / "neurons" / "part-000007.parquet"
    neurons.write_bytes(neurons.read_bytes()[:-1] + b"?")
    missing, longer, changed = lost(directory)
    assert "layers/part-000007.parquet: missing; copy it again, or delete" in missing
    assert "neurons/part-000007.parquet: the content is not what was written" in changed
    assert "were written" in longer
    with pytest.raises(BacklensError, match=r"layers/part-000007\.parquet: missing"):
        read_table(directory, "layers")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"shard": 7}', b'{"files": {"layers": {}}}'])
def test_a_broken_record_is_named(tmp_path: Path, content: bytes):
    directory = Directory.at(tmp_path)
    commit(directory)
    (tmp_path / "_commits" / "000007.json").write_bytes(content)
    with pytest.raises(BacklensError, match=r"_commits/000007\.json: not a shard record .*; delete the file"):
        committed(directory)


def test_unknown_tables_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no such tables in a shard: vocab"):
        commit_shard(Directory.at(tmp_path), 0, {"vocab": TABLES["vocab"].empty()}, first_prompt=0, prompts=0)
    with pytest.raises(BacklensError, match="no table 'neuron'; there are vocab, prompts"):
        read_table(Directory.at(tmp_path), "neuron")
