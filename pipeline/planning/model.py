"""Models that a plan computes with: with random weights, or with their own where these are at hand."""

import copy
import os
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.engine.plan import RunPlan
from pipeline.models.anatomy import anatomy
from pipeline.models.load import LoadedModel, exact_attention, read_weights
from pipeline.models.spread import stored_dtype


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


def trained_model(plan: RunPlan, folder: str) -> LoadedModel:
    """The whole model with the weights that `weights_at_hand` found, in main memory."""
    return _frozen(
        plan, read_weights(replace(plan.source, path=folder, revision=None), plan.model_config, {})
    )


def weights_at_hand(plan: RunPlan) -> str | None:
    """The folder of the model's own weights, if they are on this machine and not quantized for another."""
    source = plan.source
    if getattr(plan.model_config, "quantization_config", None) is not None:
        return None
    if os.path.isdir(source.path):
        there = any(name.endswith(".safetensors") for name in os.listdir(source.path))
        return source.path if there else None
    # in the hub's cache; models of several files are larger than a plan loads
    file = try_to_load_from_cache(source.path, "model.safetensors", revision=source.revision)
    return os.path.dirname(file) if isinstance(file, str) else None


def _frozen(plan: RunPlan, model: PreTrainedModel) -> LoadedModel:
    model.eval().requires_grad_(False)
    tokenizer: Any = None  # prompts are tokenized already
    return LoadedModel(model, tokenizer, anatomy(model, plan.source.layout), plan.source.attention)


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
