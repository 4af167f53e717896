"""The paper's findings about gradients, in the tables of the demo model (arXiv 2402.12865, sections 3 to 5)."""

import subprocess
import sys
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from backlens.demo import MODEL

LAYERS = range(8)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the demo's facts; as many of them as keep the test quick."""
    out = tmp_path_factory.mktemp("demo") / "run"
    backlens = Path(sys.executable).with_name("backlens")
    command = [backlens, "run", "--out", out, "--executor", "local", "--limit", "300", "--save-factors"]
    subprocess.run(command, check=True)
    return out


def rows(run: Path, table: str, columns: list[str]) -> list[dict]:
    return pyarrow.dataset.dataset(run / table).to_table(columns=columns).to_pylist()


def test_the_rank_of_a_gradient_is_at_most_the_number_of_positions(demo: Path) -> None:
    lengths = {row["prompt_id"]: row["n_tokens"] for row in rows(demo, "prompts", ["prompt_id", "n_tokens"])}
    ranks = rows(demo, "layers", ["prompt_id", "layer", "module", "rank"])
    assert all(row["rank"] <= lengths[row["prompt_id"]] for row in ranks)
    # The bound is met where every position still has its say (section 3.2) …
    first = [row for row in ranks if row["layer"] == 0]
    assert sum(row["rank"] == lengths[row["prompt_id"]] for row in first) >= 0.95 * len(first)
    # … and the last layer's MLP, which only the last position's loss reaches, has rank one.
    assert {row["rank"] for row in ranks if row["layer"] == LAYERS[-1]} == {1}


def test_the_last_layers_mlp_down_has_a_vjp_at_the_last_position_alone(demo: Path) -> None:
    lengths = {row["prompt_id"]: row["n_tokens"] for row in rows(demo, "prompts", ["prompt_id", "n_tokens"])}
    columns = ["prompt_id", "layer", "module", "position", "vjp_norm"]
    last_layer = [
        row
        for row in rows(demo, "tokens", columns)
        if row["layer"] == LAYERS[-1] and row["module"] == "mlp.down"
    ]
    assert last_layer
    for row in last_layer:
        assert (row["vjp_norm"] > 0) == (row["position"] == lengths[row["prompt_id"]] - 1)


def test_the_target_is_among_the_lowest_percent_of_the_last_vjps_tokens(demo: Path) -> None:
    lengths = {row["prompt_id"]: row["n_tokens"] for row in rows(demo, "prompts", ["prompt_id", "n_tokens"])}
    vocabulary = pyarrow.parquet.read_metadata(demo / "vocab" / "part-0.parquet").num_rows
    columns = ["prompt_id", "layer", "module", "position", "target_rank"]
    low: dict[int, list[bool]] = {layer: [] for layer in LAYERS}
    for row in rows(demo, "tokens", columns):
        if row["module"] == "mlp.down" and row["position"] == lengths[row["prompt_id"]] - 1:
            low[row["layer"]].append(row["target_rank"] >= 0.99 * vocabulary)
    shares = {layer: sum(found) / len(found) for layer, found in low.items()}
    assert all(shares[layer] >= 0.95 for layer in LAYERS[len(LAYERS) // 2 :]), shares


@pytest.mark.parametrize("layer", [2, 5, 7])
def test_subtracting_the_gradient_from_the_weight_raises_the_targets_probability(
    demo: Path, layer: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    weight = model.get_parameter(f"transformer.h.{layer}.mlp.c_proj.weight")
    prompts = rows(demo, "prompts", ["prompt_id", "token_ids", "target_ids", "target_prob"])[:20]
    factors = pyarrow.dataset.dataset(demo / "factors").to_table(
        filter=(pyarrow.dataset.field("layer") == layer)
        & (pyarrow.dataset.field("module") == "mlp.down")
        & (pyarrow.dataset.field("prompt_id") < 20)
    )
    for prompt in prompts:
        own = [row for row in factors.to_pylist() if row["prompt_id"] == prompt["prompt_id"]]
        gradient = torch.tensor([row["x"] for row in own]).T @ torch.tensor([row["delta"] for row in own])
        with torch.no_grad():
            weight -= 0.05 * gradient
            logits = model(torch.tensor([prompt["token_ids"]])).logits[0, -1]
            weight += 0.05 * gradient
        assert logits.softmax(-1)[prompt["target_ids"][0]] > prompt["target_prob"]
