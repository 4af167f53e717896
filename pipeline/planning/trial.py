"""How fast this machine is at a plan's own shapes: a few blocks with random weights are run on some of its batches."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.engine.budget import most_tokens
from pipeline.engine.extract import extract
from pipeline.engine.memory import release_freed_memory
from pipeline.engine.packing import pack
from pipeline.engine.plan import RunPlan
from pipeline.lens import make_lens
from pipeline.planning.model import random_model
from pipeline.planning.sample import Sample
from pipeline.prompts.tokenize import Example

FEW, MORE = 1, 3
"""Blocks of the two models whose difference is what a block takes."""
BATCHES = 4
"""So many of a shard's are run, from the shortest prompts to the longest."""
SECONDS = 1.0
"""Small models run their batches over and over for so long. Times are means: a run has its slow moments too, and the
best of some rounds was a fifth less than what runs then took."""


@dataclass(frozen=True)
class Trial:
    """Seconds of a whole run on one copy, by stage, as measured on some of its batches."""

    stages: Mapping[str, float]
    device: str


def trial(plan: RunPlan, sample: Sample, tokens: int) -> Trial:
    """Run batches of the sample through models of FEW and of MORE blocks, and reckon with the difference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = _batches(plan, sample, device)
    few, more = (_seconds(plan, layers, batches, device) for layers in (FEW, MORE))
    share = tokens / sum(len(example.token_ids) for batch in batches for example in batch)
    stages = {}
    for stage, seconds in few.items():
        block = max(0.0, more[stage] - seconds) / (MORE - FEW)
        wanted = len(plan.blocks) if stage == "model" else len(plan.wanted.layers)
        last = stage == "model" or len(plan.blocks) - 1 in plan.wanted.layers
        stages[stage] = share * (seconds + (wanted - FEW) * block if last else wanted * block)
    return Trial(stages, str(device))


def _batches(plan: RunPlan, sample: Sample, device: torch.device) -> list[list[Example]]:
    """Some of a shard's, as the engine packs them."""
    examples = sample.examples[: plan.shards.shard_prompts]
    packed = pack(sample.lengths[: len(examples)], most_tokens(plan.config.batch_tokens, device.type))
    count = min(BATCHES, len(packed))
    chosen = [packed[(2 * number + 1) * len(packed) // (2 * count)] for number in range(count)]
    return [[examples[index] for index in indices] for indices in chosen]


def _seconds(
    plan: RunPlan, layers: int, batches: Sequence[Sequence[Example]], device: torch.device
) -> dict[str, float]:
    """Seconds of all the batches, by stage."""
    loaded = random_model(plan, layers, device)
    lens = make_lens(loaded.anatomy, plan.config.scaling, plan.token_ids)
    wanted = replace(plan.wanted, layers=tuple(range(layers)))

    def run(batch: Sequence[Example]) -> Mapping[str, float]:
        extracted = extract(
            loaded,
            lens,
            batch,
            wanted,
            screening=plan.config.screening,
            recompute=plan.config.activation_checkpointing,
        )
        release_freed_memory()  # as a worker does, so that the next batch asks for memory again
        return extracted.seconds

    run(batches[-1])  # the first is slower: what it needs is read and allocated
    total: Counter[str] = Counter()
    started, passes = time.perf_counter(), 0
    while not passes or time.perf_counter() - started < SECONDS:
        for batch in batches:
            total.update(run(batch))
        passes += 1
    return {stage: seconds / passes for stage, seconds in total.items()}
