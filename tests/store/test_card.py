"""The dataset card's own lines, run with `datasets`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from backlens.store.commit import commit_shard
from backlens.store.directory import Directory
from backlens.store.run_record import finish
from tests.engine.command import called
from tests.store.examples import ExampleRun, arrow, example_run, random_rows, start_run


def with_shards_without_rows(folder: Path) -> Directory:
    """A run whose first shard has no rows but failures, whose second has them all but failures and neurons."""
    import random

    directory = Directory.at(folder)
    run = start_run(directory)
    rows = arrow(random_rows(random.Random(0), range(4), experts=False))
    failures = {"failures": rows.pop("failures")}
    del rows["neurons"]
    commit_shard(directory, 0, failures, first_prompt=0, prompts=4)
    commit_shard(directory, 1, rows, first_prompt=4, prompts=4)
    finish(run)
    return directory


def test_a_file_without_rows_has_no_row_group(tmp_path: Path):
    directory = with_shards_without_rows(tmp_path / "run")
    for path in Path(directory.root).glob("*/*.parquet"):
        metadata = pq.read_metadata(path)
        assert (metadata.num_row_groups == 0) == (metadata.num_rows == 0), path


@pytest.mark.slow
def test_every_table_that_the_card_offers_is_loaded_inside_the_folder_and_outside(tmp_path: Path):
    directory = with_shards_without_rows(tmp_path / "run")
    card = directory.read("README.md").decode()
    tables = [config["config_name"] for config in yaml.safe_load(card.split("---\n")[1])["configs"]]
    assert tables == ["vocab", "prompts", "layers", "tokens", "factors", "failures"]
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert '"tokens"' in lines
    inside = "".join(f"{lines.replace('tokens', table)}print({table}.num_rows)\n" for table in tables)
    outside = "from datasets import load_dataset\n" + "".join(
        f"print(load_dataset('run', '{table}', split='train').num_rows)\n" for table in tables
    )
    wanted = [pq.read_table(tmp_path / "run" / table).num_rows for table in tables]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    for code, folder in ((inside, tmp_path / "run"), (outside, tmp_path)):
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        assert [int(line) for line in ran.stdout.split()] == wanted


def test_a_sweep_has_a_card_of_its_own(tmp_path: Path):
    out = tmp_path / "sweep"
    made = called("edit", "sweep", out, "--layers", 5, "--lr", 0.8, "--limit", 1)
    assert made.status == 0, made.stderr
    card = (out / "README.md").read_text("utf-8")
    assert [config["config_name"] for config in yaml.safe_load(card.split("---\n")[1])["configs"]] == [
        "edits"
    ]
    assert "1 edits of facts in the backlens demo model" in card
    assert "vocab" not in card


def test_what_a_run_publishes_names_no_place_of_this_machine(tmp_path: Path):
    example = published(tmp_path)
    for name in ("README.md", "config.yaml", "run.json"):
        text = (tmp_path / "author" / "out" / name).read_text("utf-8")
        for place in (str(tmp_path), str(Path.home()), "file://"):
            assert place not in text, (name, place)
    assert example.status == 0, example.stderr


def published(folder: Path):
    from tests.tiny import save_tiny

    author = folder / "author"
    save_tiny(author / "model")
    (author / "p.jsonl").write_text('{"prompt": "a b c", "target": " d"}\n')
    options = ("--model", author / "model", "--prompts", f"file://{author}/p.jsonl", "--layers", "0")
    return called("run", *options, "--out", author / "out", "--executor", "local")


def test_runs_of_earlier_versions_are_read(tmp_path: Path):
    """Their empty tables have a row group of 0 rows, and their records hold absolute paths."""
    from backlens.atlas import Atlas

    example: ExampleRun = example_run(Directory.at(tmp_path))
    empty = pq.read_table(tmp_path / "failures" / "part-000000.parquet").slice(0, 0)
    with pq.ParquetWriter(tmp_path / "failures" / "part-000000.parquet", empty.schema) as writer:
        writer.write_table(empty, 10)
    record = (tmp_path / "run.json").read_text("utf-8")
    (tmp_path / "run.json").write_text(record.replace('"name": "tiny"', '"name": "/home/a/tiny"'), "utf-8")
    atlas = Atlas(example.out)
    assert atlas.sql("SELECT count(*) AS n FROM failures")["n"].to_pylist() == [
        sum(row["prompt_id"] >= 4 for row in example.rows["failures"])
    ]
    assert atlas.coverage().num_rows
