"""What a plan will cost, by arithmetic: tokens, rows, bytes, floating-point operations, memory and time.

Nothing of the model is computed: its sizes come from a copy without weights on the meta device, token counts
from a sample of the prompts, and the speed of this machine from a small matrix product.
"""

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from pipeline.engine.plan import RunPlan
from pipeline.models.anatomy import Anatomy, anatomy
from pipeline.models.layout import READS
from pipeline.models.load import load_tokenizer
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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plan.model_config)
    parts = anatomy(model)
    rows = _rows(plan, parts, prompts, lengths, tokens)
    weights = sum(p.numel() for p in model.parameters())
    return Estimate(
        prompts=prompts,
        tokens=tokens,
        rows=rows,
        bytes={table: round(count * _row_bytes(table, plan, parts, mean)) for table, count in rows.items()},
        flops=_flops(plan, parts, weights, prompts, tokens, mean),
        memory=_memory(plan, parts, weights),
        flops_per_second=_matrix_rate(),
        replicas=plan.config.replicas,
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
    )
    examples = [result for result in results if isinstance(result, Example)]
    forced = [len(e.target_ids) - 1 if config.target_mode == "all" else 0 for e in examples]
    lengths = [len(e.token_ids) + extra for e, extra in zip(examples, forced, strict=True)]
    return lengths, len(examples) / len(sample)


def _widths(parts: Anatomy, module: str) -> tuple[int, int]:
    """(in, out) of a module's weight matrix."""
    matrix = parts.matrices[module]
    submodule = parts.blocks[0].get_submodule(matrix.path)
    weight = submodule.weight
    assert isinstance(weight, torch.Tensor)
    wide, high = weight.shape if type(submodule).__name__ == "Conv1D" else weight.shape[::-1]
    return wide, matrix.cut.width(high) if matrix.cut else high


def _neurons(plan: RunPlan, parts: Anatomy, module: str) -> int:
    width = _widths(parts, module)[1 if module in READS else 0]
    return width if plan.wanted.neurons < 0 else min(plan.wanted.neurons, width)


def _rows(plan: RunPlan, parts: Anatomy, prompts: int, lengths: list[int], tokens: int) -> dict[str, int]:
    wanted = plan.wanted
    per_module = len(wanted.layers) * len(wanted.modules)
    neurons = sum(_neurons(plan, parts, module) for module in wanted.modules)
    positions = tokens if wanted.positions == "all" else prompts * (1 if wanted.positions == "last" else 4)
    rows = {
        "prompts": prompts,
        "layers": prompts * per_module,
        "neurons": prompts * len(wanted.layers) * neurons,
        "tokens": positions * per_module,
    }
    return rows | ({"factors": rows["tokens"]} if wanted.save_factors else {})


def _row_bytes(table: str, plan: RunPlan, parts: Anatomy, mean_length: float) -> float:
    if table == "prompts":
        return 60 + 2.5 * mean_length + 0.5 * plan.survey.characters / max(plan.survey.prompts, 1)
    if table == "factors":
        widths = [sum(_widths(parts, module)) for module in plan.wanted.modules]
        return 3.6 * sum(widths) / len(widths)
    id_bytes = math.log2(parts.vocabulary) / 8
    spectrum = SCORE_BYTES * mean_length if table == "layers" else 0
    return 2 * plan.wanted.top_k * (id_bytes + SCORE_BYTES) + OTHER_BYTES[table] + spectrum


def _flops(
    plan: RunPlan, parts: Anatomy, weights: int, prompts: int, tokens: int, mean_length: float
) -> dict[str, float]:
    """Two operations per weight forward, two backward to activations; the lens once per shared residual side."""
    wanted, vocabulary = plan.wanted, parts.vocabulary
    embedding = parts.head_weight.numel()
    reads = {module.partition(".")[0] for module in wanted.modules if module in READS}
    writes = [module for module in wanted.modules if module not in READS]
    spans = tokens * len(wanted.layers) * (len(reads) + len(writes))
    mixes = prompts * len(wanted.layers) * sum(1 + _neurons(plan, parts, m) for m in wanted.modules)
    return {
        "forward and backward": 4.0 * (weights - embedding) * tokens + 4.0 * embedding * prompts,
        "lens": 2.0 * spans * parts.d_model * vocabulary + 2.0 * mixes * mean_length * vocabulary,
    }


def _memory(plan: RunPlan, parts: Anatomy, weights: int) -> dict[str, int]:
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    stored = plan.model_config.dtype
    bytes_each = sizes.get(plan.config.dtype, stored.itemsize if isinstance(stored, torch.dtype) else 4)
    inputs = sum(_widths(parts, m)[0] for m in parts.matrices)
    # autograd keeps about as much again as the modules' inputs (activations, norms, attention)
    activations = 2 * inputs * len(parts.blocks) * plan.config.batch_tokens * bytes_each
    tiles = 3 * (2**30 if torch.cuda.is_available() else 2**25)
    return {"weights": weights * bytes_each, "activations": activations, "lens tiles": tiles}


def _matrix_rate(size: int = 1024, seconds: float = 0.3) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, device=device)
    (a @ a).sum().item()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        (a @ a).sum().item()
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - started)
