"""Another loss and another lens basis, written here, against autograd and plain products."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from backlens import BacklensError, BackwardLens, Gradients
from backlens.capture.batch import Batch
from backlens.capture.loss import LossFunction, Outcome
from backlens.projection.lens import Basis
from backlens.projection.project import TopK
from backlens.store.tables import PROMPTS, projection_columns
from tests.tiny import byte_tokenizer, save_tiny

PROMPTS_AND_TARGETS = ["the quick brown", "a", "the lazy dog sleeps in"], [" fox", "b", " Paris"]
OTHER = 77
"""The token that the contrast is with."""
LAYER = 1


class Contrast(LossFunction):
    """log p(other) − log p(target): the opposite of the contrast that gradient descent is to raise."""

    def __call__(self, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        logits = logits[:, 0].log_softmax(-1)
        return logits[:, OTHER] - logits.gather(1, targets[:, :1]).squeeze(1)


class AlsoBefore(LossFunction):
    """−log p(target), and the entropy at the position before: a loss that asks for further logits."""

    def positions(self, batch: Batch) -> Tensor:
        before = (batch.loss_positions[:, :1] - 1).clamp_min(0)
        return torch.cat([batch.loss_positions, before], dim=1)

    def __call__(self, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        logs = logits.log_softmax(-1)
        entropy = -(logs[:, -1].exp() * logs[:, -1]).sum(-1)
        return entropy - logs[:, 0].gather(1, targets[:, :1]).squeeze(1)


class Mean(LossFunction):
    def __call__(self, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return logits.mean()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), request.param)


def model_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def plain_loss(loss: LossFunction, logs: Tensor, target: int) -> Tensor:
    """The loss of one prompt, from log p at every position."""
    if isinstance(loss, Contrast):
        return logs[-1, OTHER] - logs[-1, target]
    before = logs[max(len(logs) - 2, 0)]
    return -(before.exp() * before).sum() - logs[-1, target]


@pytest.mark.parametrize("loss", [Contrast(), AlsoBefore()], ids=["contrast", "further positions"])
def test_factors_are_those_of_the_loss_that_is_passed(folder: Path, loss: LossFunction) -> None:
    g = BackwardLens(str(folder)).gradient(
        *PROMPTS_AND_TARGETS, modules="mlp.down", loss=loss, save_factors=True
    )
    for number, (prompt, target) in enumerate(zip(*PROMPTS_AND_TARGETS, strict=True)):
        model = model_of(folder)
        ids, first = byte_tokenizer()(prompt, return_tensors="pt"), byte_tokenizer()(target)["input_ids"][0]
        logs = model(ids["input_ids"]).logits[0].log_softmax(-1)
        expected_loss = plain_loss(loss, logs, first)
        expected_loss.backward()
        ending = re.compile(rf"\b{LAYER}\.mlp\.(c_proj|down_proj)\.weight$")
        name, weight = next((name, p) for name, p in model.named_parameters() if ending.search(name))
        expected = weight.grad if "c_proj" in name else weight.grad.mT
        assert (g[number, LAYER, "mlp.down"].matrix - expected).norm() <= 1e-5 * expected.norm()
        row = g.prompt.to_pylist()[number]
        assert row["loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
        assert row["target_prob"] == pytest.approx(logs[-1, first].exp().item(), rel=1e-5)
        assert row["target_rank"] == (logs[-1, :256] > logs[-1, first]).sum().item()


def test_a_loss_that_is_no_number_per_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(
        BacklensError, match=r"loss: Mean gives shape \(\) for 1 prompts; give one number per"
    ):
        BackwardLens(str(folder)).gradient("the quick", " fox", loss=Mean())


def mapped(folder: Path) -> tuple[Tensor, Gradients]:
    """A map of one layer, and gradients that are read through it."""
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    lens = BackwardLens(str(folder), basis=Basis({LAYER: matrix}))
    return matrix, lens.gradient("the quick brown", " fox", neurons=3)


@pytest.mark.parametrize("module", ["mlp.down", "mlp.up"])
def test_tokens_and_neurons_are_read_through_the_basis_of_their_layer(folder: Path, module: str) -> None:
    matrix, g = mapped(folder)
    plain = BackwardLens(str(folder)).gradient("the quick brown", " fox", neurons=3)
    model = model_of(folder)
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm

    def scores(vector: Tensor) -> Tensor:
        with torch.no_grad():
            return model.lm_head(norm(matrix @ vector))[:256]

    def rows(name: str) -> list[dict[str, Any]]:
        found = getattr(g, name).to_pylist()
        return [row for row in found if (row["layer"], row["module"]) == (LAYER, module)]

    factors = g[LAYER, module]
    residual, other = (factors.delta, factors.x) if module == "mlp.down" else (factors.x, factors.delta)
    vectors = [(row, residual[row["position"]]) for row in rows("tokens")]
    vectors += [(row, other[:, row["neuron"]] @ residual) for row in rows("neurons")]
    assert len(vectors) > 3
    for row, vector in vectors:
        if not vector.any():
            assert row["top_ids"] is None
            continue
        expected = scores(vector)
        order = expected.argsort(descending=True).tolist()
        assert row["top_ids"] == order[:10]
        assert row["bottom_ids"] == order[::-1][:10]
        assert row["top_scores"] == pytest.approx(expected[order[:10]].tolist(), rel=1e-4, abs=1e-5)
    assert [token.id for token in factors.top(k=5)] == scores(residual[-1]).argsort(descending=True)[
        :5
    ].tolist()
    assert torch.equal(factors.matrix, plain[LAYER, module].matrix)
    for name in ("layers", "neurons", "tokens"):
        ours, theirs = (
            [r for r in getattr(each, name).to_pylist() if r["layer"] != LAYER] for each in (g, plain)
        )
        assert ours == theirs
        assert [row.get("grad_norm") for row in getattr(g, name).to_pylist()] == [
            row.get("grad_norm") for row in getattr(plain, name).to_pylist()
        ]


def test_a_vector_that_the_basis_maps_to_zero_has_no_lists(folder: Path) -> None:
    lens = BackwardLens(str(folder), basis=Basis({LAYER: torch.zeros(32, 32)}))
    g = lens.gradient("the quick", " fox")
    assert g[LAYER, "mlp.down"].promoted() == []
    for name in ("layers", "neurons", "tokens"):
        for row in getattr(g, name).to_pylist():
            assert row["layer"] != LAYER or row["top_ids"] is None


def test_the_identity_costs_no_product_and_a_basis_that_does_not_fit_is_refused(folder: Path) -> None:
    lens = BackwardLens(str(folder), basis=Basis({LAYER: torch.eye(32)}))
    vectors = torch.randn(2, 32)
    assert lens.lens.basis(vectors, LAYER + 1) is vectors
    assert torch.equal(lens.lens.basis(vectors, LAYER), vectors)
    with pytest.raises(BacklensError, match=r"basis: there is no layer 3; the model has layers 0 to 2"):
        BackwardLens(str(folder), basis=Basis({3: torch.eye(32)}))
    with pytest.raises(BacklensError, match=r"basis: the map of layer 0 is \(31, 32\); give \(32, 32\)"):
        BackwardLens(str(folder), basis=Basis({0: torch.zeros(31, 32)}))


def test_results_have_the_names_of_their_columns() -> None:
    """A column is declared in the tables and computed in one place; between the two nothing spells its name."""
    assert [field.name for field in fields(TopK)] == [column.name for column in projection_columns("v")]
    facts = {field.name.replace("log_prob", "prob") for field in fields(Outcome)}
    assert facts <= {column.name for column in PROMPTS.columns}
