"""What neurons write and read by themselves: their weights against plain products, their lens against a full sort."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.atlas import Atlas
from pipeline.cli.main import call
from pipeline.models.anatomy import Block, anatomy
from pipeline.models.weights import neuron_weights
from tests.families import CONFIGS, columns_of, expert_gradient
from tests.oracle import PATHS, WRITES
from tests.tiny import random_model, save_tiny

K = 7


def matrix(case: str, block: Block, module: str, expert: int | None) -> Tensor:
    """(in, out) of a module's matrix: what it makes of unit vectors; of a fused one, the family's own columns."""
    if expert is not None:
        assert block.experts is not None
        weights = {name: value[expert][None] for name, value in block.experts.module.named_parameters()}
        return expert_gradient(case, module, weights, 0)
    path, columns = columns_of(case, module) or (block.matrices[module].path, None)
    layer = block.module.get_submodule(path)
    wide = next(n for n in layer.weight.shape if _takes(layer, n))  # type: ignore[union-attr]
    made = layer(torch.eye(wide)) - layer(torch.zeros(wide))
    return made if columns is None else made[:, columns]


def _takes(layer: torch.nn.Module, width: int) -> bool:
    try:
        layer(torch.zeros(width))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_every_familys_neurons_are_columns_they_read_or_rows_they_write(case: str):
    seen = 0
    for block in anatomy(random_model(CONFIGS[case])).blocks:
        units: list[tuple[str, int | None]] = [(module, None) for module in block.matrices]
        units += [(module, 1) for module in (block.experts.matrices if block.experts else ())]
        for module, expert in units:
            expected = matrix(case, block, module, expert)
            found = neuron_weights(block, module, expert)
            torch.testing.assert_close(
                found, expected if module in WRITES else expected.T, atol=1e-6, rtol=1e-5
            )
            seen += 1
    assert seen >= 8


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model and a run of it with every module, in a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder / "model", request.param)
    prompts = [{"prompt": f"the {word} is", "target": " so"} for word in ("sea", "air", "old road")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    files = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl")]
    options = ["--modules", "all", "--neurons", "4", "--top-k", str(K), "--executor", "local"]
    assert call(["run", *files, "--out", str(folder / "run"), *options]) == 0
    return request.param, folder


def plain_lens(family: str, folder: Path, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A neuron's weights and their scores, by the model's own norm and head in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model").double()
    paths = PATHS[family]
    block = model.get_submodule(f"{paths['blocks']}.{row['layer']}")
    path, third = paths[row["module"]]
    layer: Any = block.get_submodule(path)
    weight = layer.weight if family == "gpt2" else layer.weight.T
    if third is not None:
        weight = weight.chunk(3, dim=1)[third]
    vector = weight[row["neuron"]] if row["module"] in WRITES else weight[:, row["neuron"]]
    return vector, model.get_output_embeddings()(model.get_submodule(paths["norm"])(vector))


@torch.no_grad()
def test_lists_are_those_of_a_full_projection(made: tuple[str, Path]):
    family, folder = made
    out = str(folder / "run")
    assert call(["atlas", out]) == 0
    atlas = Atlas(out)
    rows = atlas.sql("FROM neuron_weights", 100_000).to_pylist()
    kept = atlas.sql("SELECT layer, module, neuron FROM neuron_summary", 100_000).to_pylist()
    assert [(r["layer"], r["module"], r["neuron"]) for r in rows] == [tuple(r.values()) for r in kept]
    assert {row["module"] for row in rows} == set(PATHS[family]) - {"blocks", "norm"}
    for row in rows[:: len(rows) // 40]:
        vector, scores = plain_lens(family, folder, row)
        scores = scores[:256]  # of 300 rows, the tokenizer's tokens
        order = sorted(range(len(scores)), key=lambda i: (-float(scores[i].float()), i))
        bottom = sorted(range(len(scores)), key=lambda i: (float(scores[i].float()), i))
        assert row["weight_top_ids"] == order[:K]
        assert row["weight_bottom_ids"] == bottom[:K]
        assert row["weight_top_scores"] == pytest.approx(scores[order[:K]].tolist(), rel=1e-4, abs=1e-5)
        assert row["weight_norm"] == pytest.approx(float(vector.norm()), rel=1e-6)
    first = rows[0]
    (summary,) = atlas.neuron_summary(f"{first['layer']}.{first['module']}.{first['neuron']}").to_pylist()
    vocab = atlas.sql("SELECT token FROM vocab ORDER BY token_id", 1000).column("token").to_pylist()
    assert summary["weight_top_tokens"] == [vocab[token_id] for token_id in first["weight_top_ids"]]
    assert atlas.weights_note is None


def test_a_model_that_is_gone_is_said_to_be_and_can_be_named_later(
    made: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    family, folder = made
    out, model = str(folder / "run"), folder / "model"
    for file in (folder / "run" / "atlas").glob("manifest.json"):
        file.unlink()
    for file in (folder / "run" / "atlas" / "_pieces").glob("weights-*"):
        file.unlink()
    moved = model.rename(tmp_path / "moved")
    try:
        assert call(["atlas", out]) == 0
        said = capsys.readouterr().out
        assert re.search(r"has no rows: .*model is neither a folder.*name its place with --weights", said)
        atlas = Atlas(out)
        (first, *_) = atlas.sql("FROM neuron_summary", 1).to_pylist()
        address = f"{first['layer']}.{first['module']}.{first['neuron']}"
        (summary,) = atlas.neuron_summary(address).to_pylist()
        assert summary["weight_norm"] is None
        assert call(["query", out, "--neuron", address, "--show", "summary"]) == 0
        assert "neuron_weights has no rows" in capsys.readouterr().out
        other = save_tiny(tmp_path / "other", family, seed=1)
        assert call(["atlas", out, "--weights", str(other)]) == 2
        assert re.search(r"--weights .*other: .*has other weights", capsys.readouterr().err)
        assert call(["atlas", out, "--weights", str(moved)]) == 0
        printed = capsys.readouterr()
        assert "what the neurons' weights say is added" in printed.err
        pieces = [line for line in printed.err.splitlines() if " pieces: " in line]
        assert [line for line in pieces if "(done before)" not in line] == [
            p for p in pieces if "weights" in p
        ]
        assert Atlas(out).neuron_summary(address).to_pylist()[0]["weight_norm"] > 0
    finally:
        moved.rename(model)
