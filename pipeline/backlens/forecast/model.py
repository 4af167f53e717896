"""Models that a plan computes with: with random weights, or with their own where these are at hand."""

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from backlens.engine.plan import RunPlan
from backlens.models.blocks import find_parts
from backlens.models.checkpoint import weights_here
from backlens.models.device_map import stored_dtype
from backlens.models.load import LoadedModel, exact_attention, read_weights


def random_model(plan: RunPlan, layers: int, device: torch.device) -> LoadedModel:
    """Its first blocks, with random weights."""
    config = _shortened(plan.model_config, layers)
    source = plan.source
    attention = {"attn_implementation": exact_attention(config)} if source.attention == "exact" else {}
    with device:
        model: Any = AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=source.trust_remote_code,
            dtype=stored_dtype(plan.model_config, source.dtype),
            **attention,
        )
    return _frozen(plan, model)


def trained_model(plan: RunPlan) -> LoadedModel:
    """The whole model with its weights, which are at hand, in main memory."""
    return _frozen(plan, read_weights(plan.source, plan.model_config, {}))


def weights_at_hand(plan: RunPlan) -> bool:
    """Whether the model's own weights are on this machine, in safetensors, and not quantized for another."""
    quantized = getattr(plan.model_config, "quantization_config", None) is not None
    return not quantized and weights_here(replace(plan.source, allow_pickle=False))


def _frozen(plan: RunPlan, model: PreTrainedModel) -> LoadedModel:
    model.eval().requires_grad_(False)
    tokenizer: Any = None  # prompts are tokenized already
    return LoadedModel(model, tokenizer, find_parts(model, plan.source.layout), plan.source.attention)


def _shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with its first blocks only, lists of one entry a block shortened likewise."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    count = int(config.num_hidden_layers)
    for name, value in [*vars(config).items()]:
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config
