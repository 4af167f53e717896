"""How fast this machine is at a plan's own shapes: a few blocks with random weights are run on one of its batches."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from pipeline.engine.budget import most_tokens
from pipeline.engine.extract import extract
from pipeline.engine.packing import pack
from pipeline.engine.plan import RunPlan
from pipeline.lens import make_lens
from pipeline.models.anatomy import anatomy
from pipeline.models.load import LoadedModel, exact_attention
from pipeline.models.spread import stored_dtype
from pipeline.planning.sample import Sample
from pipeline.prompts.tokenize import Example

FEW, MORE = 1, 3
"""Blocks of the two models whose difference is what a block takes."""
ROUNDS = 3
"""Times are the best of so many."""


@dataclass(frozen=True)
class Trial:
    """Seconds of a whole run on one copy, by stage, as measured on one batch."""

    stages: Mapping[str, float]
    device: str


def trial(plan: RunPlan, sample: Sample, tokens: int) -> Trial:
    """Run a batch of the sample through models of FEW and of MORE blocks, and reckon with the difference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = _batch(plan, sample, device)
    few, more = (_seconds(plan, layers, batch, device) for layers in (FEW, MORE))
    share = tokens / sum(len(example.token_ids) for example in batch)
    stages = {}
    for stage, seconds in few.items():
        block = max(0.0, more[stage] - seconds) / (MORE - FEW)
        wanted = len(plan.blocks) if stage == "model" else len(plan.wanted.layers)
        last = stage == "model" or len(plan.blocks) - 1 in plan.wanted.layers
        stages[stage] = share * (seconds + (wanted - FEW) * block if last else wanted * block)
    return Trial(stages, str(device))


def _batch(plan: RunPlan, sample: Sample, device: torch.device) -> list[Example]:
    """The middle one of a shard, as the engine packs it."""
    examples = sample.examples[: plan.shards.shard_prompts]
    packed = pack(sample.lengths[: len(examples)], most_tokens(plan.config.batch_tokens, device.type))
    largest = sorted(packed, key=lambda indices: sum(sample.lengths[index] for index in indices))
    return [examples[index] for index in largest[len(largest) // 2]]


def _seconds(plan: RunPlan, layers: int, batch: Sequence[Example], device: torch.device) -> dict[str, float]:
    loaded = _random_model(plan, layers, device)
    lens = make_lens(loaded.anatomy, plan.config.scaling)
    wanted = replace(plan.wanted, layers=tuple(range(layers)))
    rounds = [
        extract(
            loaded,
            lens,
            batch,
            wanted,
            screening=plan.config.screening,
            recompute=plan.config.activation_checkpointing,
        ).seconds
        for _ in range(ROUNDS + 1)
    ]
    return {stage: min(seconds[stage] for seconds in rounds[1:]) for stage in rounds[0]}


def _random_model(plan: RunPlan, layers: int, device: torch.device) -> LoadedModel:
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
    model.eval().requires_grad_(False)
    tokenizer: Any = None  # prompts are tokenized already
    return LoadedModel(model, tokenizer, anatomy(model, source.layout), source.attention)


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
