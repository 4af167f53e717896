"""Forecast of a run before it runs (`backlens plan`): rows, bytes, operations, devices, time and cost."""

import copy
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from backlens.backward_lens import BackwardLens
from backlens.capture.packing import most_tokens, pack, release_freed_memory
from backlens.config import PlanOptions, RunConfig
from backlens.engine.plan import RunPlan, every_matrix, make_plan
from backlens.errors import BacklensError
from backlens.forecast.bytes import (
    AssumedPrompts,
    Estimate,
    TypicalPrompts,
    estimate,
    first_prompts,
    typical_prompts,
)
from backlens.forecast.cluster import Cluster, read_cluster, this_machine
from backlens.forecast.resources import Fit, Operations, Times, fit, times_of, work_of
from backlens.models.blocks import find_parts
from backlens.models.checkpoint import weights_here
from backlens.models.device_map import stored_dtype
from backlens.models.load import LoadedModel, exact_attention, read_weights
from backlens.projection.lens import make_lens
from backlens.prompts.tokenize import Example

MOST_WEIGHTS = 2 * 10**8
"""A plan loads no model with more weights."""
FEW, MORE = 1, 3
"""Blocks of two models with random weights; the difference of their times is the time of a block."""
BATCHES = 4
"""Batches of a shard that `--calibrate` times, from the shortest prompts to the longest."""
SECONDS = 1.0
"""Batches of small models are repeated for this time. The times are means: a run has slow moments too, and the best of
several rounds was a fifth less than what runs then took."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run."""

    plan: RunPlan
    expected: Estimate
    cluster: Cluster
    fit: Fit
    work: Operations
    times: Times
    measured: bool
    """True if the stages' times were measured on this machine, False if they follow from stated speeds."""

    @property
    def dollars(self) -> float | None:
        price = self.cluster.dollars_per_hour
        return None if price is None else price * self.cluster.nodes * self.times.seconds / 3600


def make_forecast(config: RunConfig, options: PlanOptions) -> Forecast:
    """Plan a run without running it.

    Raises BacklensError for options that the model cannot meet, and for a model that does not fit on the cluster.
    """
    assumed = None
    if options.prompt_count is not None:
        if config.prompts is not None:
            raise BacklensError(
                f"--prompt-count {options.prompt_count}: it stands in for --prompts; give one of them"
            )
        assumed = AssumedPrompts.parse(options.prompt_count, options.prompt_tokens)
    cluster = this_machine() if options.cluster is None else read_cluster(options.cluster)
    # A plan writes nothing, so the output directory may be left out.
    plan = make_plan(
        replace(config, out=config.out or "./run").with_demo_defaults(), assumed and assumed.survey()
    )
    if assumed is None:
        prompts = first_prompts(plan.config, plan.source, plan.model_config)
    else:
        prompts = typical_prompts(assumed.examples(plan.rows), 1.0, plan.config)
    lens = _own_lens(plan)
    expected = estimate(plan, prompts, lens)
    placed = fit(plan, cluster)
    work = work_of(plan, prompts, expected, placed)
    times = times_of(work, cluster, placed, sum(expected.bytes.values()))
    if options.calibrate:
        times = replace(times, stages=_calibrated(plan, prompts, lens, expected.tokens))
    return Forecast(plan, expected, cluster, placed, work, times, options.calibrate)


def _own_lens(plan: RunPlan) -> BackwardLens | None:
    """The model with its own weights; None if it is large, quantized, or not on this machine in safetensors."""
    d_model = int(plan.model_config.get_text_config().hidden_size)
    matrices = every_matrix(plan.blocks, plan.model_config)
    weights = sum(m.wide * m.high * m.experts for m in matrices) + plan.rows * d_model
    quantized = getattr(plan.model_config, "quantization_config", None) is not None
    if weights > MOST_WEIGHTS or quantized or not weights_here(replace(plan.source, allow_pickle=False)):
        return None
    model = read_weights(plan.source, plan.model_config, {})
    torch.nn.Module.to(model, _device())
    return _lens_of(plan, model)


def _lens_of_few_blocks(plan: RunPlan, layers: int) -> BackwardLens:
    """The model's first blocks, with random weights."""
    config = _shortened(plan.model_config, layers)
    source = plan.source
    attention = {"attn_implementation": exact_attention(config)} if source.attention == "exact" else {}
    with _device():
        model: Any = AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=source.trust_remote_code,
            dtype=stored_dtype(plan.model_config, source.dtype),
            **attention,
        )
    return _lens_of(plan, model)


def _lens_of(plan: RunPlan, model: PreTrainedModel) -> BackwardLens:
    model.eval().requires_grad_(False)
    tokenizer: Any = None  # The prompts are token ids already, and the folder may hold no tokenizer.
    loaded = LoadedModel(model, tokenizer, find_parts(model, plan.source.layout), plan.source.attention)
    return BackwardLens.from_parts(loaded, make_lens(loaded.parts, plan.config.scaling, plan.token_ids))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with fewer blocks; lists with one entry per block are cut to the same length."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    count = int(config.num_hidden_layers)
    for name, value in [*vars(config).items()]:
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def _calibrated(
    plan: RunPlan, prompts: TypicalPrompts, lens: BackwardLens | None, tokens: int
) -> dict[str, float]:
    """Seconds per stage if one copy on this machine computed all `tokens`, measured on some batches."""
    batches = _batches(plan, prompts)
    share = tokens / sum(len(example.token_ids) for batch in batches for example in batch)
    if lens is not None:
        return {stage: share * each for stage, each in _seconds(plan, lens, batches).items()}
    few, more = (
        _seconds(_first_layers(plan, layers), _lens_of_few_blocks(plan, layers), batches)
        for layers in (FEW, MORE)
    )
    stages = {}
    for stage, seconds in few.items():
        block = max(0.0, more[stage] - seconds) / (MORE - FEW)
        wanted = len(plan.blocks) if stage == "model" else len(plan.options.layers)
        last = stage == "model" or len(plan.blocks) - 1 in plan.options.layers
        stages[stage] = share * (seconds + (wanted - FEW) * block if last else wanted * block)
    return stages


def _first_layers(plan: RunPlan, layers: int) -> RunPlan:
    return replace(plan, options=replace(plan.options, layers=tuple(range(layers))))


def _batches(plan: RunPlan, prompts: TypicalPrompts) -> list[list[Example]]:
    """Some batches of a shard, packed as a run packs them."""
    examples = prompts.examples[: plan.shards.shard_prompts]
    packed = pack(prompts.lengths[: len(examples)], most_tokens(plan.config.batch_tokens, _device().type))
    count = min(BATCHES, len(packed))
    chosen = [packed[(2 * number + 1) * len(packed) // (2 * count)] for number in range(count)]
    return [[examples[index] for index in indices] for indices in chosen]


def _seconds(plan: RunPlan, lens: BackwardLens, batches: Sequence[Sequence[Example]]) -> dict[str, float]:
    """Mean seconds per stage for all batches together."""

    def run(batch: Sequence[Example]) -> Mapping[str, float]:
        seconds = lens.rows(batch, plan.options).seconds
        release_freed_memory()  # A worker does so too, and the next batch asks for the memory again.
        return seconds

    run(batches[-1])  # The first batch is slower: it reads and allocates what later ones find.
    total: Counter[str] = Counter()
    started, passes = time.perf_counter(), 0
    while not passes or time.perf_counter() - started < SECONDS:
        for batch in batches:
            total.update(run(batch))
        passes += 1
    return {stage: seconds / passes for stage, seconds in total.items()}
