"""What a plan will take: tokens, rows and bytes, counted and measured on a specimen.

Sizes of the model come from a copy without weights on the meta device, token counts from a sample of the prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.engine.plan import RunPlan
from pipeline.engine.sizes import MatrixSize, matrices_of
from pipeline.models.spread import stored_dtype
from pipeline.planning.pilot import Pilot, pilot
from pipeline.planning.sample import Sample
from pipeline.planning.specimen import ShardSpec, shard_bytes


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to write."""

    prompts: int
    tokens: int
    rows: Mapping[str, int]
    bytes: Mapping[str, int]
    pilot: Pilot | None
    """What bytes a row were measured on; None for random factors."""


def estimate(plan: RunPlan, sample: Sample) -> Estimate:
    """Work out what `plan` will write, if all prompts are like the sample."""
    prompts = round(plan.survey.prompts * sample.readable)
    matrices = matrices_of(plan.blocks, plan.wanted, plan.model_config)
    rows = _rows(plan, matrices, sample, prompts)
    rows["failures"] = plan.survey.prompts - prompts
    found = pilot(plan, sample, rows)
    sizes = _bytes(plan, matrices, sample, rows, found)
    return Estimate(prompts, round(prompts * sample.mean_length), rows, sizes, found)


def _rows(plan: RunPlan, matrices: Sequence[MatrixSize], sample: Sample, prompts: int) -> dict[str, int]:
    wanted, mean = plan.wanted, sample.mean_length
    rows = {
        "prompts": prompts,
        "layers": round(prompts * sum(m.seen_by(mean) for m in matrices)),
        "neurons": round(prompts * sum(m.seen_by(mean) * m.kept(wanted.neurons) for m in matrices)),
        "tokens": round(prompts * sum(m.tokens(sample.positions) for m in matrices)),
    }
    return rows | ({"factors": rows["tokens"]} if wanted.save_factors else {})


def _bytes(
    plan: RunPlan,
    matrices: Sequence[MatrixSize],
    sample: Sample,
    rows: Mapping[str, int],
    found: Pilot | None,
) -> dict[str, int]:
    layers, shards = plan.wanted.layers, plan.shards.shards
    config = plan.model_config
    each = [matrix for matrix in matrices if matrix.layer == layers[0]]
    spec = ShardSpec(
        prompts=min(plan.shards.shard_prompts, plan.shards.prompts),
        layers=len(layers),
        matrices=each,
        has_last=layers[-1] == len(plan.blocks) - 1,
        wanted=plan.wanted,
        scaling=plan.config.scaling,
        vocabulary=plan.tokens,
        dtype=stored_dtype(config, plan.config.dtype),
        d_model=int(config.get_text_config().hidden_size),
    )
    one = shard_bytes(spec, sample, {table: count / shards for table, count in rows.items()}, found)
    return {table: round(size * shards) for table, size in one.items()}
