"""A matrix that a model uses in another way than by calling its module once is refused, never half in the rows."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.capture import MatrixMissed, capture, make_batch, verify_capture
from pipeline.models.load import LoadedModel, ModelSource, load_model
from tests.families import CONFIGS
from tests.tiny import byte_tokenizer, random_model

BATCH = [([5, 9, 2], [3]), ([7, 1, 2, 8, 8], [250]), ([4], [8])]


def loaded(folder: Path, family: str = "llama") -> LoadedModel:
    random_model(CONFIGS[family]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_model(ModelSource(str(folder)), torch.device("cpu"))


def rows(model: LoadedModel, recompute: bool = False) -> Counter[tuple[int, str]]:
    """How many prompts came with each layer and module."""
    seen: Counter[tuple[int, str]] = Counter()

    def count(group: Any) -> None:
        for gradient in group:
            seen[gradient.layer, gradient.module] += len(gradient.slots.prompts)

    layers = range(len(model.anatomy.blocks))
    batch = make_batch(BATCH, torch.device("cpu"))
    capture(model, batch, layers, model.anatomy.modules, count, recompute=recompute)
    return seen


def uncalled(mlp: Any, x: Tensor) -> Tensor:
    return functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)


def ungraphed(mlp: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = mlp.gate_proj(x)
    return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))


def twice(mlp: Any, x: Tensor) -> Tensor:
    units = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return mlp.down_proj(units) + 0.1 * mlp.down_proj(units.square())


def in_chunks(mlp: Any, x: Tensor) -> Tensor:
    return torch.cat([type(mlp).forward(mlp, part) for part in x.split(2, dim=1)], dim=1)


def of_the_first_prompt(mlp: Any, x: Tensor) -> Tensor:
    first = type(mlp).forward(mlp, x[:1])
    return torch.cat([first, uncalled_everywhere(mlp, x[1:])])


def uncalled_everywhere(mlp: Any, x: Tensor) -> Tensor:
    gate, up = (functional.linear(x, each.weight) for each in (mlp.gate_proj, mlp.up_proj))
    return functional.linear(mlp.act_fn(gate) * up, mlp.down_proj.weight)


def turned(mlp: Any, x: Tensor) -> Tensor:
    """Positions first."""
    return type(mlp).forward(mlp, x.transpose(0, 1)).transpose(0, 1)


def unused(mlp: Any, x: Tensor) -> Tensor:
    mlp.up_proj(x)
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))


def named(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(input=mlp.act_fn(mlp.gate_proj(input=x)) * mlp.up_proj(input=x))


def looked_at_before(mlp: Any, x: Tensor) -> Tensor:
    """A second call without a graph takes no part in the gradient."""
    with torch.no_grad():
        mlp.up_proj(x)
    return type(mlp).forward(mlp, x)


FAULTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "uncalled": (uncalled, "mlp.down of layer 1 cannot be had: mlp.down_proj is never called"),
    "no-grad": (
        ungraphed,
        "mlp.gate of layer 1 cannot be had: mlp.gate_proj gives an output without a graph",
    ),
    "twice": (twice, "mlp.down of layer 1 cannot be had: mlp.down_proj is called more than once"),
    "chunks": (in_chunks, "computes (3, 2) tokens where the batch has (3, 5)"),
    "some prompts": (of_the_first_prompt, "computes (1, 5) tokens where the batch has (3, 5)"),
    "turned": (turned, "computes (5, 3) tokens where the batch has (3, 5)"),
    "unused": (unused, "mlp.up of layer 1 cannot be had: mlp.up_proj was called, but the loss passes no"),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_matrix_that_is_passed_by_is_named(fault: str, recompute: bool, tmp_path: Path) -> None:
    model = loaded(tmp_path)
    mlp: Any = model.anatomy.blocks[1].module.get_submodule("mlp")
    forward, says = FAULTS[fault]
    mlp.forward = lambda x: forward(mlp, x)
    with pytest.raises(MatrixMissed) as refused:
        rows(model, recompute)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("forward", [named, looked_at_before])
def test_one_call_with_a_graph_is_enough(
    forward: Callable[[Any, Tensor], Tensor], recompute: bool, tmp_path: Path
) -> None:
    model = loaded(tmp_path)
    expected = rows(model)
    mlp: Any = model.anatomy.blocks[1].module.get_submodule("mlp")
    mlp.forward = lambda x: forward(mlp, x)
    assert rows(model, recompute) == expected
    assert set(expected.values()) == {3}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_fused_matrix_that_is_passed_by_is_named_by_all_its_modules(
    recompute: bool, tmp_path: Path
) -> None:
    model = loaded(tmp_path, "gpt2")
    fused = model.anatomy.blocks[0].module.get_submodule("attn.c_attn")
    fused.__class__ = type("PastHooks", (type(fused),), {"__call__": type(fused).forward})
    with pytest.raises(MatrixMissed, match=r"attn\.q, attn\.k, attn\.v of layer 0 .* attn\.c_attn is never"):
        rows(model, recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_are_computed_past_us_are_named(family: str, recompute: bool, tmp_path: Path) -> None:
    model = loaded(tmp_path, family)
    rows(model, recompute)  # experts that got no token have no rows, and that is no fault
    experts: Any = model.anatomy.blocks[1].experts and model.anatomy.blocks[1].experts.module
    experts.forward = lambda hidden, *_: hidden * experts.down_proj.mean()
    with pytest.raises(MatrixMissed, match=r"of layer 1 cannot be had: \w+_proj is never called"):
        rows(model, recompute)
    with pytest.raises(MatrixMissed, match="is never called"):
        verify_capture(model, [1], ["mlp.up"], recompute=recompute)
    verify_capture(model, [0], ["mlp.up"], recompute=recompute)


def test_experts_under_no_grad_and_experts_called_twice_are_named(tmp_path: Path) -> None:
    model = loaded(tmp_path, "mixtral")
    experts: Any = model.anatomy.blocks[0].experts and model.anatomy.blocks[0].experts.module
    own = type(experts).forward

    def without_graph(*given: Any) -> Tensor:
        with torch.no_grad():
            return own(experts, *given)

    experts.forward = without_graph
    with pytest.raises(MatrixMissed, match=r"of layer 0 .* without a graph"):
        rows(model)
    experts.forward = lambda *given: own(experts, *given) + own(experts, *given)
    with pytest.raises(MatrixMissed, match=r"of layer 0 .* more than once"):
        rows(model)
