"""Experts through the command: rows of the tokens routed to them, against autograd on their 3-D weights."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.engine.command import called
from tests.families import CONFIGS, expert_gradient
from tests.tiny import byte_tokenizer, random_model

PROMPTS = ["x", "The sea", "Paris is the capital", "ab" * 9]
TARGETS = ["y", " is", " of", "a"]
MODULES = ("mlp.up", "mlp.gate", "mlp.down")
Rows = list[dict[str, Any]]


class Case:
    """One family's model, the tables of a run over it, and its gradients by autograd."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.model = random_model(CONFIGS[family])
        self.folder = folder
        self.model.save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        lines = [json.dumps({"prompt": p, "target": t}) for p, t in zip(PROMPTS, TARGETS, strict=True)]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
        self.tables = self.run("out")

    def run(self, out: str, *options: object) -> dict[str, Rows]:
        model, prompts, out_folder = self.folder / "model", self.folder / "prompts.jsonl", self.folder / out
        arguments = [
            "run",
            "--model",
            model,
            "--prompts",
            prompts,
            "--out",
            out_folder,
            "--executor",
            "local",
        ]
        finished = called(
            *arguments, "--neurons", -1, "--top-k", 5, "--save-factors", "--vocabulary", "model", *options
        )
        assert finished.status == 0, finished.stderr
        names = ("layers", "neurons", "tokens", "factors")
        return {name: pyarrow.dataset.dataset(out_folder / name).to_table().to_pylist() for name in names}


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "qwen2_moe"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def by_expert(rows: Rows) -> dict[tuple[int, int, str, int], Rows]:
    """Rows of experts' matrices by prompt, layer, module and expert."""
    found: dict[tuple[int, int, str, int], Rows] = defaultdict(list)
    for row in rows:
        if row["expert"] is not None:
            found[row["prompt_id"], row["layer"], row["module"], row["expert"]].append(row)
    return found


def gradients(model: PreTrainedModel, family: str, prompt: int) -> dict[tuple[int, str, int], Tensor]:
    """(in, out) of every expert's matrix, for one prompt alone, in float64."""
    tokenizer = byte_tokenizer()
    model = model.double().requires_grad_(True)
    model.set_experts_implementation(
        "eager"
    )  # the loop of the model's own file; the grouped product knows no float64
    model.zero_grad()
    logits = model(torch.tensor([tokenizer.encode(PROMPTS[prompt])])).logits[0, -1]
    (-logits.log_softmax(-1)[tokenizer.encode(TARGETS[prompt])[0]]).backward()
    found = {}
    for layer, block in enumerate(model.get_submodule("model.layers").children()):
        if not hasattr(block.mlp, "experts"):
            continue
        experts = block.get_submodule("mlp.experts")
        weights = {
            name: weight.grad for name, weight in experts.named_parameters() if weight.grad is not None
        }
        for module in MODULES:
            for expert in range(4):
                found[layer, module, expert] = expert_gradient(family, module, weights, expert)
    return found


def test_every_experts_rows_say_what_autograd_says(case: Case) -> None:
    factors, layers, neurons = (by_expert(case.tables[name]) for name in ("factors", "layers", "neurons"))
    norm = case.model.get_submodule("model.norm")
    for prompt in range(len(PROMPTS)):
        found = gradients(case.model, case.family, prompt)
        largest = max(float(gradient.norm()) for gradient in found.values())
        for (layer, module, expert), gradient in found.items():
            key = prompt, layer, module, expert
            if key not in layers:
                assert not gradient.any(), f"{key}: no token was routed there"
                continue
            x, delta = (torch.tensor([row[name] for row in factors[key]]).double() for name in ("x", "delta"))
            assert (x.T @ delta - gradient).norm() <= 1e-5 * max(float(gradient.norm()), 0.03 * largest), key
            (row,) = layers[key]
            assert row["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4, abs=1e-5 * largest)
            by_neuron = gradient.mT if module != "mlp.down" else gradient  # (neuron, d_model)
            assert len(neurons[key]) == len(by_neuron)
            for row in neurons[key]:
                if row["grad_norm"] <= 1e-4 * largest:
                    continue
                with torch.no_grad():
                    scores = case.model.lm_head(norm(by_neuron[row["neuron"]]))
                assert row["top_scores"] == pytest.approx(scores.topk(5).values.tolist(), rel=1e-3, abs=1e-3)


def test_tokens_has_a_row_for_each_expert_a_token_went_to(case: Case) -> None:
    rows: dict[tuple[int, int, str, int], set[int]] = defaultdict(set)
    for row in case.tables["tokens"]:
        if row["expert"] is not None:
            rows[row["prompt_id"], row["layer"], row["module"], row["position"]].add(row["expert"])
            assert row["token_id"] == byte_tokenizer().encode(PROMPTS[row["prompt_id"]])[row["position"]]
    routed_layers = {row["layer"] for row in case.tables["tokens"] if row["expert"] is not None}
    assert len(rows) == sum(map(len, PROMPTS)) * len(routed_layers) * len(MODULES)
    assert {len(experts) for experts in rows.values()} == {2}


def test_rows_do_not_depend_on_the_batch(case: Case) -> None:
    alone = case.run("alone", "--batch-tokens", 1)
    for table in ("layers", "tokens"):
        for one, other in zip(alone[table], case.tables[table], strict=True):
            keys = ("prompt_id", "layer", "module", "expert", "top_ids")
            assert [one[key] for key in keys] == [other[key] for key in keys]
            if one["top_scores"] is not None:
                assert one["top_scores"] == pytest.approx(other["top_scores"], rel=1e-3, abs=1e-4)


def test_plan_counts_experts_rows(case: Case) -> None:
    model, prompts, out = case.folder / "model", case.folder / "prompts.jsonl", case.folder / "planned"
    finished = called("plan", "--model", model, "--prompts", prompts, "--out", out, "--neurons", -1)
    assert finished.status == 0, finished.stderr
    rows = re.findall(r"^\W*(tokens|neurons|layers)\W+([\d,]+)", finished.stdout, re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count in rows}
    assert counts["tokens"] == len(case.tables["tokens"])
    # tokens routed at random reach more experts than a prompt's alike tokens do
    assert len(case.tables["layers"]) <= counts["layers"] <= 2 * len(case.tables["layers"])
    assert len(case.tables["neurons"]) <= counts["neurons"] <= 2 * len(case.tables["neurons"])
