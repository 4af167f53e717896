"""A prompt's rows are its own: not its batch's, its padding's, or the number of workers'."""

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import GPT2Config

from backlens.backward_lens import BackwardLens
from backlens.capture.batch import Side
from backlens.columns import fact_table
from backlens.models.load import ModelSource, load_model
from backlens.projection.lens import make_lens
from backlens.prompts.prompt import Prompt
from backlens.prompts.tokenize import Example
from backlens.rows import RowOptions
from tests.engine.command import (
    assert_complete,
    assert_same_rows,
    assert_same_run,
    backlens,
    called,
    in_order,
    read,
    write_jsonl,
)
from tests.tiny import byte_tokenizer, random_model, save_tiny

FAMILIES = ("gpt2", "llama")
LENGTHS = (1, 200, 1, 2, 150, 3, 90)
PROMPTS = 64
ONE_BATCH = 1_000_000


def texts() -> list[str]:
    """Prompts of 1 to 200 tokens, in random order."""
    draw = random.Random(5)
    lengths = [*LENGTHS, *(draw.randint(4, 40) for _ in range(PROMPTS - len(LENGTHS)))]
    return ["".join(draw.choices("abcdefghijklmnop ", k=length - 1)) + "x" for length in lengths]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [{"prompt": text, "target": " y"} for text in texts()]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "lengths.jsonl", records)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def alone(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in which every prompt is a batch by itself."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    _run(model, prompts, out, "--batch-tokens", 1)
    assert read(out, "prompts")["n_tokens"].to_pylist() == [len(text) for text in texts()]
    return out


def _run(model: Path, prompts: Path, out: Path, *options: object) -> Path:
    done = called(*_command(model, prompts, out), "--executor", "local", *options)
    assert done.status == 0, done.stderr
    assert_complete(out, PROMPTS)
    return out


def _command(model: Path, prompts: Path, out: Path) -> tuple[object, ...]:
    return (
        *("run", "--model", model, "--prompts", prompts, "--out", out),
        *("--modules", "all", "--neurons", 4, "--top-k", 5),
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, PROMPTS])
def test_rows_do_not_depend_on_the_size_of_the_batch(
    size: int, model: Path, prompts: Path, alone: Path, tmp_path: Path
) -> None:
    out = _run(model, prompts, tmp_path / "out", "--shard-prompts", size, "--batch-tokens", ONE_BATCH)
    assert_same_run(alone, out)


@pytest.mark.slow
def test_rows_do_not_depend_on_how_prompts_are_packed(
    model: Path, prompts: Path, alone: Path, tmp_path: Path
) -> None:
    assert_same_run(
        alone, _run(model, prompts, tmp_path / "out", "--shard-prompts", 20, "--batch-tokens", 400)
    )


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_do_not_depend_on_the_padding_side_that_the_tokenizer_prefers(
    side: str, model: Path, prompts: Path, alone: Path, tmp_path: Path
) -> None:
    sided = shutil.copytree(model, tmp_path / "model")
    settings = json.loads((sided / "tokenizer_config.json").read_text())
    (sided / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": side}))
    assert_same_run(alone, _run(sided, prompts, tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "replicas"), [("gpt2", 1), ("llama", 3)], indirect=["model"])
def test_rows_do_not_depend_on_the_number_of_workers(
    replicas: int, model: Path, prompts: Path, alone: Path, tmp_path: Path, cluster: tuple[str, int]
) -> None:
    out = tmp_path / "out"
    engine = ("--executor", "ray", "--replicas", replicas, "--address", cluster[0])
    done = backlens(*_command(model, prompts, out), "--shard-prompts", 5, *engine)
    assert done.status == 0, done.stderr
    assert f"{replicas} cop" in done.stderr
    assert_complete(out, PROMPTS)
    assert_same_run(alone, out)


def test_lists_and_ranks_do_not_depend_on_what_screens_them(prompts: Path, tmp_path: Path) -> None:
    shape = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=5000, bos_token_id=None, eos_token_id=None)
    random_model(shape).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    one, other = (
        _run(tmp_path / "model", prompts, tmp_path / screening, "--screening", screening)
        for screening in ("float32", "bfloat16")
    )
    for table in ("layers", "neurons", "tokens"):
        assert read(one, table).equals(read(other, table))


@pytest.mark.parametrize("positions", ["all", "last", "subject+last"])
@pytest.mark.parametrize("target_mode", ["first", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_may_be_padded_on_either_side(
    family: str, target_mode: str, positions: str, tmp_path: Path
) -> None:
    loaded = load_model(ModelSource(str(save_tiny(tmp_path, family))), torch.device("cpu"))
    reader = BackwardLens.from_parts(loaded, make_lens(loaded.parts, "raw"))
    wanted = RowOptions(
        layers=(0, 1, 2),
        modules=loaded.parts.modules,
        positions=positions,  # pyright: ignore[reportArgumentType]
        target_mode=target_mode,  # pyright: ignore[reportArgumentType]
        top_k=5,
        neurons=4,
        save_factors=True,
    )
    examples = [_example(number, length) for number, length in enumerate([1, 40, 2, 17])]

    def tables(side: Side) -> dict[str, pa.Table]:
        blocks = reader.rows(examples, wanted, side=side).blocks
        return {name: in_order(fact_table(name, blocks[name]), name) for name in blocks}

    right, left = tables("right"), tables("left")
    assert set(right) == {"layers", "neurons", "tokens", "factors"}
    for name in right:
        assert_same_rows(right[name], left[name], name)
    singly = [reader.rows([example], wanted).blocks["tokens"] for example in examples]
    rows = in_order(fact_table("tokens", [block for blocks in singly for block in blocks]), "tokens")
    assert_same_rows(right["tokens"], rows, "tokens")


def _example(number: int, length: int) -> Example:
    draw = random.Random(number)
    ids = tuple(draw.randrange(200) for _ in range(length))
    targets = tuple(draw.randrange(200) for _ in range(1 + number % 3))
    return Example(Prompt(number, "", "", ""), ids, targets, 0, max(1, length // 3))
