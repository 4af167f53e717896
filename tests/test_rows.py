"""The tables that the command writes, against an oracle that shares no code with it (`tests/oracle.py`)."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.oracle import WRITES, Oracle, Truth
from tests.tiny import byte_tokenizer, save_tiny

TOP_K = 8
PROMPTS = ["x", "The sea", "ab" * 11, "Paris is the capital of", "a longer prompt, of forty-one characters!"]
TARGETS = [" F", "b", "Rome", " France", "?"]
CASES = [("gpt2", "raw"), ("gpt2", "unit"), ("llama", "raw"), ("llama", "unit")]


@dataclass(frozen=True)
class Run:
    tables: dict[str, list[dict]]
    oracle: Oracle
    truths: list[Truth]
    targets: list[int]
    scaling: str

    def scores(self, vector: Tensor) -> Tensor:
        """Scores of the tokenizer's tokens: the model's other rows are in no list and no rank."""
        return self.oracle.lens(vector, self.scaling)[: len(byte_tokenizer())]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    family, scaling = request.param
    folder = tmp_path_factory.mktemp(family)
    model = save_tiny(folder / "model", family)
    lines = [json.dumps({"prompt": p, "target": t}) for p, t in zip(PROMPTS, TARGETS, strict=True)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    options = [
        "--modules",
        "all",
        "--neurons",
        "6",
        "--top-k",
        str(TOP_K),
        "--scaling",
        scaling,
        "--save-factors",
    ]
    command = ["run", "--model", model, "--prompts", folder / "prompts.jsonl", "--out", folder / "out"]
    backlens = Path(sys.executable).with_name("backlens")
    subprocess.run([backlens, *command, "--executor", "local", *options], check=True)
    tokenizer = byte_tokenizer()
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    targets = [tokenizer.encode(text)[0] for text in TARGETS]
    oracle = Oracle(AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager"))
    truths = [oracle.truth(ids, [target]) for ids, target in zip(prompts, targets, strict=True)]
    tables = {
        name: pyarrow.dataset.dataset(folder / "out" / name).to_table().to_pylist()
        for name in ("prompts", "layers", "neurons", "tokens", "factors")
    }
    return Run(tables, oracle, truths, targets, scaling)


def test_losses_equal_those_of_the_model_alone(run: Run) -> None:
    for row in run.tables["prompts"]:
        assert row["loss"] == pytest.approx(run.truths[row["prompt_id"]].loss, rel=1e-5)
        assert row["target_prob"] == pytest.approx(torch.tensor(-row["loss"]).exp().item(), rel=1e-5)


def test_factors_multiply_to_autograds_weight_gradient(run: Run) -> None:
    factors: dict[tuple[int, int, str], list[tuple[Tensor, Tensor]]] = {}
    for row in run.tables["factors"]:
        key = (row["prompt_id"], row["layer"], row["module"])
        factors.setdefault(key, []).append((torch.tensor(row["x"]), torch.tensor(row["delta"])))
    assert len(factors) == len(PROMPTS) * 3 * len(run.oracle.modules)
    for (prompt, layer, module), pairs in factors.items():
        product = torch.stack([x for x, _ in pairs]).double().T @ torch.stack([d for _, d in pairs]).double()
        gradient = run.truths[prompt].gradients[layer, module]
        error = (product - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error <= 1e-5, (prompt, layer, module)


def test_every_prompt_layer_module_and_position_has_its_row_in_order(run: Run) -> None:
    keys = [(r["layer"], r["module"], r["prompt_id"], r["position"]) for r in run.tables["tokens"]]
    expected = [
        (layer, module, prompt, position)
        for layer in range(3)
        for module in sorted(run.oracle.modules)
        for prompt, text in enumerate(PROMPTS)
        for position in range(len(text))
    ]
    assert keys == expected
    ids = byte_tokenizer()
    for row in run.tables["tokens"]:
        assert row["token_id"] == ids.encode(PROMPTS[row["prompt_id"]])[row["position"]]


def test_token_rows_hold_the_norms_of_input_and_vjp(run: Run) -> None:
    for row in run.tables["tokens"]:
        truth, key = run.truths[row["prompt_id"]], (row["layer"], row["module"])
        strongest = truth.vjps[key].norm(dim=-1).max().item()
        assert row["input_norm"] == pytest.approx(truth.inputs[key][row["position"]].norm().item(), rel=1e-5)
        norm = truth.vjps[key][row["position"]].norm().item()
        assert row["vjp_norm"] == pytest.approx(norm, rel=1e-4, abs=max(1e-5 * strongest, 1e-7))


def test_token_projections_equal_a_full_sort_of_the_oracles_scores(run: Run) -> None:
    for row in run.tables["tokens"]:
        truth, key = run.truths[row["prompt_id"]], (row["layer"], row["module"])
        side = truth.vjps[key] if row["module"] in WRITES else truth.inputs[key]
        check_projection(run, row, side[row["position"]])


def test_layer_rows_hold_the_spectrum_of_the_weight_gradient(run: Run) -> None:
    for row in run.tables["layers"]:
        gradient = run.truths[row["prompt_id"]].gradients[row["layer"], row["module"]]
        expected = torch.linalg.svdvals(gradient)
        found = torch.tensor(row["singular_values"], dtype=torch.float64)
        assert len(found) == min(len(PROMPTS[row["prompt_id"]]), *gradient.shape)
        assert (found - expected[: len(found)]).abs().max() <= 1e-5 * max(expected[0].item(), 1e-4)
        assert row["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5, abs=1e-7)
        if expected[0] > 1e-6:
            assert row["rank"] == torch.linalg.matrix_rank(gradient.float())
            assert row["rank"] <= len(PROMPTS[row["prompt_id"]])


def test_layer_projections_are_those_of_the_leading_singular_vector_with_its_largest_entry_positive(
    run: Run,
) -> None:
    for row in run.tables["layers"]:
        gradient = run.truths[row["prompt_id"]].gradients[row["layer"], row["module"]]
        u, values, v = torch.linalg.svd(gradient)
        if values[0] < 1e-6 or values[1] > 0.98 * values[0]:  # zero, or no single leading direction
            continue
        direction = v[0] if row["module"] in WRITES else u[:, 0]
        direction = direction * direction[direction.abs().argmax()].sign()
        check_projection(run, row, direction)


def test_the_kept_neurons_are_the_strongest_and_their_projections_are_exact(run: Run) -> None:
    rows: dict[tuple[int, int, str], list[dict]] = {}
    for row in run.tables["neurons"]:
        rows.setdefault((row["prompt_id"], row["layer"], row["module"]), []).append(row)
    assert len(rows) == len(PROMPTS) * 3 * len(run.oracle.modules)
    for (prompt, layer, module), kept in rows.items():
        gradient = run.truths[prompt].gradients[layer, module]
        vectors = gradient if module in WRITES else gradient.T
        norms = vectors.norm(dim=-1)
        assert len(kept) == 6
        assert [row["neuron"] for row in kept] == sorted(row["neuron"] for row in kept)
        weakest = min(row["grad_norm"] for row in kept)
        assert (norms > weakest * (1 + 1e-4) + 1e-7).sum() <= len(kept)
        for row in kept:
            assert row["grad_norm"] == pytest.approx(norms[row["neuron"]].item(), rel=1e-4, abs=1e-7)
            if row["grad_norm"] > 1e-6:
                check_projection(run, row, vectors[row["neuron"]])
                truth = run.truths[prompt]
                x, vjp = truth.inputs[layer, module], truth.vjps[layer, module]
                terms = (
                    x[:, row["neuron"], None] * vjp if module in WRITES else vjp[:, row["neuron"], None] * x
                )
                lengths = terms.norm(dim=-1)
                assert lengths[row["main_position"]] >= lengths.max() * (1 - 1e-4)


def test_only_the_last_position_of_the_last_layers_mlp_down_has_a_vjp(run: Run) -> None:
    for row in run.tables["tokens"]:
        if row["layer"] == 2 and row["module"] == "mlp.down":
            last = row["position"] == len(PROMPTS[row["prompt_id"]]) - 1
            assert (row["vjp_norm"] > 0) == last
            assert (row["top_ids"] is not None) == last
            assert (row["target_rank"] is not None) == last


def check_projection(run: Run, row: dict, vector: Tensor) -> None:
    """A row's projection columns against a full sort of the vector's scores."""
    if vector.norm() < 1e-7:  # zero, or rounding of zero: a prompt of one token has no attention to learn
        return
    scores = run.scores(vector)
    scale = scores.abs().max().item()
    ordered, order = scores.sort(descending=True, stable=True)
    for side, values, ids in (("top", ordered, order), ("bottom", ordered.flip(0), order.flip(0))):
        found = torch.tensor(row[f"{side}_scores"], dtype=torch.float64)
        assert len(found) == TOP_K
        assert (found - values[:TOP_K]).abs().max() <= 1e-4 * scale
        gaps = (values[: TOP_K + 1].diff().abs() > 1e-5 * scale).tolist()
        for place in range(TOP_K):
            if gaps[place] and (place == 0 or gaps[place - 1]):
                assert row[f"{side}_ids"][place] == ids[place]
    target = scores[run.targets[row["prompt_id"]]]
    assert row["target_score"] == pytest.approx(target.item(), abs=1e-4 * scale)
    margin = 1e-5 * scale
    assert (scores > target + margin).sum() <= row["target_rank"] <= (scores > target - margin).sum()
