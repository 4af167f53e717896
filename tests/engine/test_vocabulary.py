"""Rows of the unembedding that are no token, and tokens that the model has no row for, through the command."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.engine.command import called, error_line, read, write_jsonl
from tests.tiny import LLAMA_SHAPE, byte_tokenizer, random_model

PROMPTS = [{"prompt": "The sea", "target": " is"}, {"prompt": "Paris", "target": "!"}]
ROWS = 300


def with_gaps() -> PreTrainedTokenizerFast:
    """Bytes under ids with gaps: 3, 4, 6, 7, 9 … and two beyond the last gap."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = [index for index in range(ROWS + 100) if index % 3 != 2][2 : 2 + len(alphabet)]
    ids = [index if index < ROWS else None for index in ids]
    spare = iter(index for index in range(2, ROWS, 3))
    taken = [next(spare) if index is None else index for index in ids]
    backend = Tokenizer(models.BPE(dict(zip(alphabet, taken, strict=True)), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


KINDS = {"first ids": byte_tokenizer, "gaps": with_gaps}


class Case:
    def __init__(self, kind: str, folder: Path) -> None:
        self.tokenizer = KINDS[kind]()
        self.model = random_model(LlamaConfig(vocab_size=ROWS, **LLAMA_SHAPE))
        self.folder = folder
        self.model.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        self.prompts = write_jsonl(folder / "prompts.jsonl", PROMPTS)
        self.ids = sorted(self.tokenizer.get_vocab().values())

    def command(self, name: str, *options: object) -> list[object]:
        given = [name, "--model", self.folder / "model", "--prompts", self.prompts]
        return [*given, *options]

    def run(self, out: Path, *options: object) -> Path:
        finished = called(
            *self.command("run", "--out", out, "--executor", "local", "--save-factors", *options)
        )
        assert finished.status == 0, finished.stderr
        return out


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def out(case: Case) -> Path:
    return case.run(case.folder / "out", "--top-k", 7)


def lens_scores(model: PreTrainedModel, vector: list[float]) -> torch.Tensor:
    with torch.no_grad():
        norm: Any = model.get_submodule("model.norm")
        return model.get_output_embeddings()(norm(torch.tensor(vector)))  # pyright: ignore[reportOptionalCall]


def in_full(case: Case, ids: list[int], out: Path) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Each row of `tokens` of mlp.down, with its scores of these ids by the model's own modules."""
    tokens = [row for row in read(out, "tokens").to_pylist() if row["module"] == "mlp.down"]
    place = ("prompt_id", "layer", "position")
    factors = {
        tuple(row[key] for key in place): row["delta"]
        for row in read(out, "factors").to_pylist()
        if row["module"] == "mlp.down"
    }
    return [
        (row, lens_scores(case.model, factors[tuple(row[key] for key in place)])[ids])
        for row in tokens
        if row["top_ids"] is not None
    ]


@pytest.mark.parametrize("vocabulary", ["tokenizer", "model"])
def test_lists_and_ranks_are_a_full_projections_over_these_ids(
    vocabulary: str, case: Case, out: Path, tmp_path: Path
) -> None:
    ids = case.ids if vocabulary == "tokenizer" else list(range(ROWS))
    found = (
        out
        if vocabulary == "tokenizer"
        else case.run(tmp_path / "out", "--top-k", 7, "--vocabulary", "model")
    )
    rows = in_full(case, ids, found)
    assert len(rows) > 20
    targets = [case.tokenizer.encode(record["target"])[0] for record in PROMPTS]
    for row, scores in rows:
        top, bottom = scores.topk(7), (-scores).topk(7)
        assert row["top_ids"] == [ids[place] for place in top.indices]
        assert row["bottom_ids"] == [ids[place] for place in bottom.indices]
        assert row["top_scores"] == pytest.approx(top.values.tolist(), rel=1e-4, abs=1e-4)
        own = scores[ids.index(targets[row["prompt_id"]])]
        assert row["target_rank"] == int((scores > own).sum())


def test_every_id_of_every_table_is_a_token_and_has_its_text(case: Case, out: Path) -> None:
    vocab = pq.read_table(out / "vocab" / "part-0.parquet").to_pylist()
    assert [row["token_id"] for row in vocab] == case.ids
    assert b"".join(sorted(row["bytes"] for row in vocab)) == bytes(range(256))
    for table in ("tokens", "layers", "neurons"):
        for row in read(out, table).to_pylist():
            listed = (row["top_ids"] or []) + (row["bottom_ids"] or [])
            assert set(listed) <= set(case.ids)


def test_the_models_own_prediction_is_a_token_too(case: Case, out: Path) -> None:
    for row in read(out, "prompts").to_pylist():
        ids = case.tokenizer.encode(PROMPTS[row["prompt_id"]]["prompt"])
        target = case.tokenizer.encode(PROMPTS[row["prompt_id"]]["target"])[0]
        with torch.no_grad():
            logits = case.model(torch.tensor([ids])).logits[0, -1]
        among = logits[case.ids]
        assert row["predicted_id"] == case.ids[int(among.argmax())]
        assert row["target_rank"] == int((among > logits[target]).sum())
        assert row["loss"] == pytest.approx(-float(logits.log_softmax(-1)[target]), rel=1e-4)


def test_the_run_the_plan_and_the_doctor_say_what_is_left_out(case: Case, out: Path, tmp_path: Path) -> None:
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["vocabulary"] == record["fingerprint"]["vocabulary"] == "tokenizer"
    assert (record["model"]["vocabulary"], record["model"]["tokens"]) == (ROWS, 256)
    line = "44 of the unembedding's 300 rows are no tokens"
    planned = called(*case.command("plan"))
    assert line in planned.stdout
    assert line not in called(*case.command("plan", "--vocabulary", "model")).stdout
    resumed = called(
        *case.command("run", "--out", out, "--executor", "local", "--save-factors", "--top-k", 7)
    )
    assert resumed.status == 0
    assert line in resumed.stderr
    other = case.command("run", "--out", out, "--save-factors", "--top-k", 7, "--vocabulary", "model")
    refused = called(*other, "--executor", "local")
    assert refused.status == 2
    assert "vocabulary tokenizer" in error_line(refused)
    checked = json.loads(called(*case.command("doctor", "--json")).stdout)
    (check,) = (check for check in checked["checks"] if check["name"] == "vocabulary")
    assert check["measured"] == 44
    assert "left out of lists and ranks (--vocabulary tokenizer)" in check["detail"]
    assert checked["healthy"]


def test_a_list_longer_than_what_is_left_is_refused(case: Case, tmp_path: Path) -> None:
    for command in ("run", "plan"):
        refused = called(*case.command(command, "--out", tmp_path / "out", "--top-k", 257))
        assert refused.status == 2
        assert "--top-k 257: the vocabulary has 256 tokens (--vocabulary model: 300)" in error_line(refused)
    longest = case.run(tmp_path / "longest", "--top-k", 256, "--layers", 0)
    assert all(
        sorted(row["top_ids"]) == case.ids for row in read(longest, "tokens").to_pylist() if row["top_ids"]
    )


def test_tokens_without_an_embedding_are_named_as_prompts_are_read(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<fact>", "<person>"])
    model = random_model(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=257, bos_token_id=None))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [("a", "b"), ("<person> a", "b"), ("a", "<person>"), ("a<fact>", "b"), ("c", "b<person>")]
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p, "target": t} for p, t in records])
    given = ("--model", tmp_path / "model", "--prompts", prompts)
    finished = called("run", *given, "--out", tmp_path / "out", "--executor", "local")
    assert finished.status == 1, finished.stderr
    failed = {row["prompt_id"]: row for row in read(tmp_path / "out", "failures").to_pylist()}
    assert set(failed) == {1, 2, 4}
    for row in failed.values():
        assert (row["stage"], row["error"]) == ("tokenize", "no-embedding")
        assert "token '<person>' has id 257, but the model has embeddings for ids up to 256" in row["message"]
    assert len(read(tmp_path / "out", "prompts")) == 2
    checked = json.loads(called("doctor", "--model", tmp_path / "model", "--json").stdout)
    (check,) = (check for check in checked["checks"] if check["name"] == "vocabulary")
    assert "1 of the tokenizer's tokens have no embedding ('<person>'" in check["detail"]
