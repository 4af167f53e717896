"""`--chat-template` on the command line: what it writes, and where it is refused."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tests.engine.command import Finished, assert_same_run, called, error_line, read, write_jsonl
from tests.tiny import save_tiny

TEMPLATE = "[U]{{ messages[0].content }}\n{% if add_generation_prompt %}[A]\n{{ '' }}{% endif %}"
RECORDS = [
    {"prompt": "Where is Rome", "target": " Italy", "subject": "Rome"},
    {"prompt": "[U] or [A]", "target": "neither", "subject": "[U]"},
]


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", RECORDS)


def run(model: Path, prompts: Path, out: Path, *options: object) -> Finished:
    command = ("run", "--model", model, "--prompts", prompts, "--out", out, "--executor", "local")
    return called(*command, "--neurons", 2, "--top-k", 3, *options)


def test_a_prompt_is_asked_in_the_template_and_kept_as_it_was_written(
    chatty: Path, prompts: Path, tmp_path: Path
) -> None:
    assert run(chatty, prompts, tmp_path / "out", "--chat-template").status == 0
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    for row, record in zip(read(tmp_path / "out", "prompts").to_pylist(), RECORDS, strict=True):
        text = f"[U]{record['prompt']}\n[A]\n"
        assert {name: row[name] for name in record} == record
        assert tokenizer.decode(row["token_ids"]) == text
        assert tokenizer.decode(row["target_ids"]) == record["target"].strip()
        assert row["n_tokens"] == len(text)  # one token a byte
        start = 3 + record["prompt"].index(record["subject"])
        assert (row["subject_start"], row["subject_end"]) == (start, start + len(record["subject"]))
    chat = write_jsonl(
        tmp_path / "chat.jsonl",
        [{**r, "prompt": f"[U]{r['prompt']}\n[A]\n", "target": r["target"].strip()} for r in RECORDS],
    )
    assert run(chatty, chat, tmp_path / "plain").status == 0
    losses = [read(tmp_path / out, "prompts")["loss"].to_pylist() for out in ("out", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_template_is_part_of_what_a_run_is(chatty: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(chatty, prompts, out, "--chat-template").status == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["chat-template"] is True
    assert called("run", out / "config.yaml", "--out", tmp_path / "again").status == 0
    assert_same_run(out, tmp_path / "again")
    assert "no chat-template" in error_line(run(chatty, prompts, out))
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = TEMPLATE + "!"
    tokenizer.save_pretrained(chatty)
    refused = run(chatty, prompts, out, "--chat-template")
    assert refused.status == 2
    assert "chat-template" in error_line(refused)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_tokenizer_without_a_template_is_refused_before_anything_starts(
    command: str, gpt2: Path, prompts: Path, tmp_path: Path
) -> None:
    options = ("--model", gpt2, "--prompts", prompts, "--out", tmp_path / "out", "--chat-template")
    refused = called(command, *options)
    assert refused.status == 2
    assert error_line(refused) == (
        f"--chat-template: the tokenizer of {gpt2} has no chat template; leave the option out, or give --model "
        "a model that was trained to chat"
    )
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_plan_counts_the_tokens_of_the_template(chatty: Path, prompts: Path, tmp_path: Path) -> None:
    options = ("--model", chatty, "--prompts", prompts, "--out", tmp_path / "out")
    plain, chat = called("plan", *options), called("plan", *options, "--chat-template")
    assert (plain.status, chat.status) == (0, 0), chat.stderr
    tokens = sum(len(record["prompt"]) for record in RECORDS)
    assert f"{tokens} " in plain.stdout
    assert f"{tokens + 16} " in chat.stdout
