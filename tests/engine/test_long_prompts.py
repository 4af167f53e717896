"""A prompt as long as the model's context, in bounded memory."""

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
from transformers import LlamaConfig

from tests.engine.command import called, peak_memory
from tests.families import CONFIGS
from tests.tiny import LLAMA_SHAPE, byte_tokenizer, random_model

LENGTH = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    shape: dict[str, Any] = LLAMA_SHAPE | {"num_hidden_layers": 12, "max_position_embeddings": LENGTH}
    random_model(LlamaConfig(vocab_size=300, **shape)).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    prompt = ("The sea, the sea. " * LENGTH)[:LENGTH]
    record = {"prompt": prompt, "target": "y", "subject": "sea"}
    (folder / "prompts.jsonl").write_text(json.dumps(record))
    return folder


def run(folder: Path, out: str, *options: str) -> int:
    """Peak resident memory, in MiB."""
    arguments = [
        "run",
        "--executor",
        "local",
        "--model",
        folder / "model",
        "--prompts",
        folder / "prompts.jsonl",
    ]
    return peak_memory(*arguments, "--out", folder / out, "--neurons", 2, *options, folder=folder) // 1024


@pytest.mark.slow
def test_checkpointing_bounds_memory_and_changes_no_row(folder: Path) -> None:
    options = ["--layers", "0,11", "--positions", "last"]
    whole, checkpointed = (
        run(folder, "whole", *options),
        run(folder, "again", *options, "--activation-checkpointing"),
    )
    # eager attention keeps a matrix of length × length × heads for each of 12 layers: 36 MB each
    assert checkpointed <= whole - 300, (whole, checkpointed)
    for name in ("tokens", "layers", "neurons"):
        one, other = (pyarrow.dataset.dataset(folder / out / name).to_table() for out in ("whole", "again"))
        assert one.num_rows
        assert one.select(["layer", "module", "top_ids", "target_rank"]).equals(
            other.select(["layer", "module", "top_ids", "target_rank"])
        )


@pytest.mark.slow
def test_positions_limit_the_rows_of_tokens(folder: Path) -> None:
    options = ("--layers", "5", "--positions", "subject+last", "--activation-checkpointing", "--neurons", 2)
    files = ("--model", folder / "model", "--prompts", folder / "prompts.jsonl", "--out", folder / "few")
    assert called("run", "--executor", "local", *files, *options).status == 0
    rows = (
        pyarrow.dataset.dataset(folder / "few" / "tokens")
        .to_table(columns=["module", "position"])
        .to_pylist()
    )
    positions = {row["position"] for row in rows}
    assert positions == {1489, 1490, 1491, LENGTH - 1}  # the subject's last place
    assert len(rows) == 4 * 3


def test_a_prompt_longer_than_an_mpt_reads_is_a_failure_of_that_prompt(tmp_path: Path) -> None:
    """Its configuration has a name of its own for the context, beyond which it has no positions."""
    model = random_model(CONFIGS["mpt"])
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    records = [{"prompt": "x" * length, "target": "y"} for length in (64, 65)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    where = (
        "--model",
        tmp_path / "model",
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--out",
        tmp_path / "out",
    )
    done = called("run", *where, "--executor", "local")
    assert done.status == 1, done.stderr
    failures = pyarrow.dataset.dataset(tmp_path / "out" / "failures").to_table().to_pylist()
    assert [(row["prompt_id"], row["error"]) for row in failures] == [(1, "too-long")]
    assert "the model reads at most 64" in failures[0]["message"]
