"""Mixture-of-experts layers, one expert after the other, so that each one's inputs and outputs can be watched.

transformers keeps the experts of a layer as 3-D weights and computes them in one grouped product that no hook can
look into. It lets others register an implementation: ours computes the same, expert by expert, and shows each
matrix's input and output to whoever watches.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pipeline.errors import BacklensError
from pipeline.models.layout import Cut
from pipeline.models.structure import full_shape

IMPLEMENTATION = "backlens"

Watcher = Callable[[int, str, Tensor, Tensor, Tensor], None]
"""Called with an expert's index, the submodule's weight ("gate_up_proj", "up_proj" or "down_proj"), the tokens routed
to it (indices into the flattened batch, ascending), the weight's input and its output, a row a token."""

Begin = Callable[[Tensor], Watcher]
"""Called with the input of all experts, each time that they compute; gives who watches them then."""

_BEGINNINGS: WeakKeyDictionary[nn.Module, Begin] = WeakKeyDictionary()


def expert_matrices(experts: nn.Module) -> Mapping[str, tuple[str, Cut | None]]:
    """The weight that holds each module of an expert, and the module's part of that weight's output.

    Raises BacklensError for experts that transformers does not compute through its interface (other code, or weights
    quantized into a form of their own): what cannot be watched must not be left out in silence.
    """
    wanted = ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj")
    weights = [getattr(experts, name, None) for name in wanted]
    if not hasattr(experts, "_apply_gate") or not all(
        isinstance(w, Tensor) and len(full_shape(w)) == 3 for w in weights
    ):
        raise BacklensError(
            f"model: its experts ({type(experts).__name__}) are not 3-D weights that transformers computes through its "
            "experts interface; load the model with unquantized experts"
        )
    if wanted[0] == "up_proj":
        return {"mlp.up": ("up_proj", None), "mlp.down": ("down_proj", None)}
    halves = experts.is_concatenated
    gate, up = (Cut(1, 2, i, i + 1) if halves else Cut(_width(experts), 2, i, i + 1) for i in (0, 1))
    return {
        "mlp.gate": ("gate_up_proj", gate),
        "mlp.up": ("gate_up_proj", up),
        "mlp.down": ("down_proj", None),
    }


def _width(experts: Any) -> int:
    """Units of one expert."""
    return full_shape(experts.down_proj)[1 if experts.is_transposed else 2]


@contextmanager
def watching(model: PreTrainedModel, watchers: Mapping[nn.Module, Begin]) -> Iterator[None]:
    """Compute experts one by one (from now on), and tell `watchers` of each experts module."""
    if watchers and model.config._experts_implementation != IMPLEMENTATION:
        model.set_experts_implementation(IMPLEMENTATION)
    _BEGINNINGS.update(watchers)
    try:
        yield
    finally:
        for module in watchers:
            del _BEGINNINGS[module]


def one_by_one(
    experts: Any,
    hidden_states: Float[Tensor, "token d_model"],
    top_k_index: Int[Tensor, "token choice"],
    top_k_weights: Float[Tensor, "token choice"],
) -> Float[Tensor, "token d_model"]:
    """What transformers' own implementations compute, for one expert at a time; called in place of them."""
    begin = _BEGINNINGS.get(experts)
    watcher = begin(hidden_states) if begin is not None else None
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    total = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        tokens, choice = (top_k_index == expert).nonzero(as_tuple=True)
        x = hidden_states[tokens]
        opened = _linear(experts, first, expert, x)
        units = experts._apply_gate(opened) if experts.has_gate else experts.act_fn(opened)
        output = _linear(experts, "down_proj", expert, units)
        if watcher is not None:
            watcher(expert, first, tokens, x, opened)
            watcher(expert, "down_proj", tokens, units, output)
        weighted = output * top_k_weights[tokens, choice, None]
        total = total.index_add(0, tokens, weighted.to(total.dtype))
    return total


def _linear(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    y = x @ (weight if experts.is_transposed else weight.mT)
    return y + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else y


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, one_by_one)
