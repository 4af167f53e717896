"""What a plan will cost, by arithmetic: tokens, rows, bytes, floating-point operations, memory and time.

Nothing of the model is computed: its sizes come from a copy without weights on the meta device, token counts
from a sample of the prompts, and the speed of this machine from a small matrix product.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.engine.budget import most_tokens
from pipeline.engine.plan import RunPlan
from pipeline.engine.sizes import MatrixSize, matrices_of
from pipeline.models.layout import MODULES, READS
from pipeline.models.load import empty_model, load_tokenizer
from pipeline.prompts.read import read_prompts
from pipeline.prompts.record import Prompt
from pipeline.prompts.tokenize import Example, context_length, tokenize

SAMPLE = 512
"""Prompts tokenized to estimate the rest."""

SCORE_BYTES = 3.3
"""A float32 score in Parquet, byte-stream-split and zstd: the exponent compresses, the mantissa does not."""

OTHER_BYTES = {"tokens": 12, "neurons": 10, "layers": 16}
"""A row's other columns, compressed; sorted keys take next to nothing."""


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take. Counts are of the whole run, memory of one copy of the model."""

    prompts: int
    tokens: int
    rows: Mapping[str, int]
    bytes: Mapping[str, int]
    flops: Mapping[str, float]
    memory: Mapping[str, int]
    """Bytes on the device of one replica."""
    flops_per_second: float
    """Measured here, float32 matrix product."""
    replicas: int

    @property
    def seconds(self) -> float:
        return sum(self.flops.values()) / self.flops_per_second / self.replicas


def estimate(plan: RunPlan) -> Estimate:
    """Work out what `plan` will take."""
    lengths, readable = _sample_lengths(plan)
    prompts = round(plan.survey.prompts * readable)
    mean = sum(lengths) / max(len(lengths), 1)
    tokens = round(prompts * mean)
    matrices = matrices_of(plan.blocks, plan.wanted, plan.model_config)
    weights = _weights(plan)
    rows = _rows(plan, matrices, prompts, tokens)
    return Estimate(
        prompts=prompts,
        tokens=tokens,
        rows=rows,
        bytes={name: round(count * _row_bytes(name, plan, matrices, mean)) for name, count in rows.items()},
        flops=_flops(plan, matrices, weights, prompts, tokens),
        memory=_memory(plan, weights),
        flops_per_second=_matrix_rate(),
        replicas=1 if plan.config.replicas == "auto" else plan.config.replicas,
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    all: int
    per_token: float
    """Of the blocks, those that a token meets."""
    inputs: int
    """Widths of the blocks' matrices' inputs, summed."""


def _weights(plan: RunPlan) -> _Weights:
    every = replace(plan.wanted, layers=tuple(range(len(plan.blocks))), modules=MODULES)
    sizes = matrices_of(plan.blocks, every, plan.model_config)
    return _Weights(
        all=sum(p.numel() for p in empty_model(plan.source, plan.model_config).parameters()),
        per_token=float(sum(size.wide * size.high * size.chosen for size in sizes)),
        inputs=sum(size.wide * size.chosen for size in sizes),
    )


def _sample_lengths(plan: RunPlan) -> tuple[list[int], float]:
    """Positions of each sampled prompt, and the share of the sample that can be processed."""
    config = plan.config
    assert config.prompts is not None
    records = read_prompts(config.prompts, config.format, config.prompt_fields, config.limit)
    sample = list(itertools.islice(records, SAMPLE))
    results = tokenize(
        [record for record in sample if isinstance(record, Prompt)],
        load_tokenizer(plan.source),
        prepend_bos=config.prepend_bos,
        target_mode=config.target_mode,
        context=context_length(plan.model_config),
        chat_template=config.chat_template,
    )
    examples = [result for result in results if isinstance(result, Example)]
    forced = [len(e.target_ids) - 1 if config.target_mode == "all" else 0 for e in examples]
    lengths = [len(e.token_ids) + extra for e, extra in zip(examples, forced, strict=True)]
    return lengths, len(examples) / len(sample)


def _rows(plan: RunPlan, matrices: Sequence[MatrixSize], prompts: int, tokens: int) -> dict[str, int]:
    wanted = plan.wanted
    mean = tokens / max(prompts, 1)
    projected = mean if wanted.positions == "all" else 1.0 if wanted.positions == "last" else 4.0
    rows = {
        "prompts": prompts,
        "layers": round(prompts * sum(m.seen_by(mean) for m in matrices)),
        "neurons": round(prompts * sum(m.seen_by(mean) * m.kept(wanted.neurons) for m in matrices)),
        "tokens": round(prompts * sum(m.tokens(projected) for m in matrices)),
    }
    return rows | ({"factors": rows["tokens"]} if wanted.save_factors else {})


def _row_bytes(table: str, plan: RunPlan, matrices: Sequence[MatrixSize], mean_length: float) -> float:
    if table == "prompts":
        return 60 + 2.5 * mean_length + 0.5 * plan.survey.characters / max(plan.survey.prompts, 1)
    if table == "factors":
        return 3.6 * sum((m.wide + m.high) * m.chosen for m in matrices) / sum(m.chosen for m in matrices)
    id_bytes = math.log2(plan.model_config.vocab_size) / 8
    spectrum = SCORE_BYTES * mean_length if table == "layers" else 0
    return 2 * plan.wanted.top_k * (id_bytes + SCORE_BYTES) + OTHER_BYTES[table] + spectrum


def _flops(
    plan: RunPlan, matrices: Sequence[MatrixSize], weights: _Weights, prompts: int, tokens: int
) -> dict[str, float]:
    """Two operations per weight forward, two backward to activations; the lens once per shared residual side."""
    vocabulary, d_model = plan.model_config.vocab_size, plan.model_config.hidden_size
    mean = tokens / max(prompts, 1)
    # gate reads what up reads, k and v what q reads
    sides = sum(m.chosen for m in matrices if m.module in ("mlp.up", "attn.q") or m.module not in READS)
    mixes = prompts * sum(m.seen_by(mean) * (1 + m.kept(plan.wanted.neurons)) for m in matrices)
    return {
        "forward and backward": 4.0 * weights.per_token * tokens + 4.0 * vocabulary * d_model * prompts,
        "lens": 2.0 * tokens * sides * d_model * vocabulary + 2.0 * mixes * mean * vocabulary,
    }


def _memory(plan: RunPlan, weights: _Weights) -> dict[str, int]:
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    stored = plan.model_config.dtype
    bytes_each = sizes.get(plan.config.dtype, stored.itemsize if isinstance(stored, torch.dtype) else 4)
    # autograd keeps about as much again as the modules' inputs (activations, norms, attention)
    batch_tokens = most_tokens(plan.config.batch_tokens, "cuda" if torch.cuda.is_available() else "cpu")
    activations = 2 * weights.inputs * batch_tokens * bytes_each
    if plan.config.activation_checkpointing:
        activations //= len(plan.blocks)
    tiles = 3 * (2**30 if torch.cuda.is_available() else 2**25)
    return {"weights": weights.all * bytes_each, "activations": activations, "lens tiles": tiles}


def _matrix_rate(size: int = 1024, seconds: float = 0.3) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, device=device)
    (a @ a).sum().item()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        (a @ a).sum().item()
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - started)
