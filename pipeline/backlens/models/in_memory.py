"""A model that is already in memory: used where it is, and left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backlens.models.blocks import find_parts
from backlens.models.layout import Layout
from backlens.models.load import Attention, LoadedModel, exact_attention
from backlens.models.module_tree import verify_backward


def adopt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout | None = None,
    attention: Attention = "exact",
) -> LoadedModel:
    """Find the parts of a model in memory; call it, and everything that uses its result, inside `borrowed`.

    Raises BacklensError as `find_parts` does, and where a matrix passes no gradient.
    """
    parts = find_parts(model, layout)
    verify_backward(model, [block.module for block in parts.blocks])
    return LoadedModel(model, tokenizer, parts, attention)


@contextmanager
def borrowed(model: PreTrainedModel, attention: Attention = "exact") -> Iterator[None]:
    """Hold a model as a run holds it: evaluation mode, frozen weights, exact attention; then put everything back."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config: Any = model.config
    own_attention, own_experts = config._attn_implementation, config._experts_implementation
    wanted = exact_attention(config) if attention == "exact" else own_attention
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        if wanted != own_attention:
            model.set_attn_implementation(wanted)
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for parameter in trained:
            parameter.requires_grad_(True)
        if config._attn_implementation != own_attention:
            model.set_attn_implementation(own_attention)
        if config._experts_implementation != own_experts:
            model.set_experts_implementation(own_experts)
