"""A run directory is made, resumed or refused, and says what it holds."""

from pathlib import Path

import pytest
import yaml

from backlens.errors import BacklensError
from backlens.store.commit import commit_shard, write_vocab
from backlens.store.directory import Directory
from backlens.store.lock import DriverLock
from backlens.store.run_record import ShardPlan, finish, load_run, open_run
from backlens.store.status import read_table
from tests.store.examples import VOCAB, example_run

PLAN = ShardPlan(prompts=8, shards=2, shard_prompts=4)


def open_with(directory: Directory, plan: ShardPlan = PLAN, config_yaml: str = "a: 1\n", **fingerprint):
    return open_run(directory, fingerprint, config={"a": 1}, config_yaml=config_yaml, plan=plan)


@pytest.fixture(params=["local", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    return Directory.at(tmp_path / "run" if request.param == "local" else f"memory://{tmp_path.name}")


def test_a_new_directory_becomes_a_run(directory: Directory):
    with DriverLock(directory):
        run = open_with(directory, top_k=10)
    assert not run.resumed
    assert load_run(directory) == run.record
    assert run.record.status == "running"
    assert directory.names() == ["README.md", "config.yaml", "run.json"]
    assert directory.read("config.yaml") == b"a: 1\n"


def test_the_same_fingerprint_resumes_with_the_plan_the_run_was_made_with(directory: Directory):
    first = open_with(directory, top_k=10)
    again = open_with(
        directory, plan=ShardPlan(prompts=8, shards=8, shard_prompts=1), config_yaml="a: 2\n", top_k=10
    )
    assert again.resumed
    assert again.record.plan == PLAN
    assert again.record.created_at == first.record.created_at
    assert directory.read("config.yaml") == b"a: 2\n"


def test_another_fingerprint_is_refused_with_each_difference_named(directory: Directory):
    open_with(directory, top_k=10, dtype="float32", model="tiny", neurons=16)
    with pytest.raises(BacklensError) as refusal:
        open_with(directory, top_k=20, dtype="bfloat16", model="tiny", prepend_bos=True)
    assert str(refusal.value) == (
        f"out: {directory} was made with top-k 10, dtype float32, neurons 16 and no prepend-bos, this run "
        "has top-k 20, dtype bfloat16, no neurons and prepend-bos True; use another --out, "
        "or the same options"
    )
    assert load_run(directory).fingerprint["top_k"] == 10


def test_one_difference_reads_as_one(directory: Directory):
    open_with(directory, top_k=10)
    with pytest.raises(
        BacklensError, match="was made with top-k 10, this run has top-k 20; use another --out"
    ):
        open_with(directory, top_k=20)


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        BacklensError, match=r"is not empty and is not a run directory \(it holds 'thesis.tex'"
    ):
        open_with(Directory.at(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_leftovers_of_a_crash_at_the_start_are_not_other_files(tmp_path: Path):
    (tmp_path / ".run.json.0123.tmp").write_text("{")
    assert not open_with(Directory.at(tmp_path)).resumed


def test_a_finished_run_says_so_until_a_shard_is_missing(directory: Directory):
    run = open_with(directory, plan=ShardPlan(prompts=4, shards=1, shard_prompts=4))
    commit_shard(directory, 0, {}, first_prompt=0, prompts=4)
    done = finish(run)
    assert load_run(directory).status == "done"
    assert done.record.finished_at
    assert open_with(directory).record == done.record
    directory.remove("_commits/000000.json")
    assert open_with(directory).record.status == "running"


def test_the_card_has_a_config_for_each_table_and_true_numbers(directory: Directory):
    example = example_run(directory)
    assert all(example.rows.values())
    card = directory.read("README.md").decode()
    _, front_matter, text = card.split("---\n", 2)
    configs = {config["config_name"]: config for config in yaml.safe_load(front_matter)["configs"]}
    assert list(configs) == ["vocab", "prompts", "layers", "neurons", "tokens", "factors", "failures"]
    assert configs["neurons"]["data_files"] == [{"split": "train", "path": "neurons/*.parquet"}]
    assert f"| `tokens` | {len(example.rows['tokens'])} |" in text
    assert "7 prompts" in text
    assert "neither negated" in text


def test_the_card_offers_only_what_can_be_loaded(directory: Directory):
    run = open_with(directory, plan=ShardPlan(prompts=4, shards=1, shard_prompts=4))
    commit_shard(directory, 0, {}, first_prompt=0, prompts=4)
    finish(run)
    card = directory.read("README.md").decode()
    assert "config_name" not in card
    assert "load_dataset" not in card
    assert "| `failures` | 0 |" in card


def test_an_unfinished_run_says_so_on_its_card(directory: Directory):
    example_run(directory, committed=1)
    assert "not complete" in directory.read("README.md").decode()


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b'{"plan": {"rows": 1}}'])
def test_an_unreadable_run_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(BacklensError, match=r"run\.json: not a record"):
        load_run(Directory.at(tmp_path))


def test_what_is_not_a_run_is_named(tmp_path: Path):
    with pytest.raises(BacklensError, match="is not a run directory"):
        load_run(Directory.at(tmp_path / "nothing"))


def test_the_vocabulary_is_written_once(directory: Directory):
    write_vocab(directory, VOCAB, [token.encode() for token in VOCAB])
    write_vocab(directory, ["other"], [b"other"])
    rows = read_table(directory, "vocab")
    assert rows.column("token").to_pylist() == VOCAB
    assert rows.column("bytes").to_pylist() == [token.encode() for token in VOCAB]
    assert rows.column("token_id").to_pylist() == list(range(len(VOCAB)))
