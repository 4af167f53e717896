"""A few of the prompts computed by a small model, and their rows stretched to a shard's.

How well Parquet packs rows depends on how they repeat each other: layers read nearly the same residual stream, so a
prompt's lists resemble each other from layer to layer, and models favour some tokens in the lists of many prompts.
Random factors know neither, so where a model is small the rows of a few prompts are computed as a run computes them,
with its weights where these are at hand.

Few rows take more bytes each, or fewer, than a shard's: a dictionary is written once, and an index into it has as
many bits as its size asks for. So the rows are copied for further prompts until there are enough. In a copy each token
stands for another that as many prompts have in their lists, for the same one in all of the prompt's rows, and scores
and norms are multiplied by a number of the prompt's. What is alike within a prompt stays alike, and what
many prompts share is shared as often; only that two prompts have a whole list in common is lost.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.engine.blocks import Block, Projections, Ragged
from pipeline.engine.budget import ON_CPU
from pipeline.engine.extract import extract
from pipeline.engine.packing import pack
from pipeline.engine.plan import RunPlan
from pipeline.engine.sizes import every_matrix, matrices_of
from pipeline.lens import make_lens
from pipeline.models.load import LoadedModel
from pipeline.planning.model import random_model, trained_model, weights_at_hand
from pipeline.planning.sample import Sample, numbered
from pipeline.prompts.tokenize import Example
from pipeline.store.parquet import ROW_GROUP_ROWS

WEIGHTS = 2 * 10**8
"""At most so many has a model that is loaded or made for a plan."""
OPERATIONS = 2e11
"""What computing the prompts may take: two or three seconds of one core."""
SCORE, ROW = 160, 10**6
"""Operations that take as long as the passes over one score, and as one row's way from factors to file."""
LEAST = 2
"""Prompts; one alone does not say what it shares with others."""
SPREAD = 0.2
"""Standard deviation of the logarithm of the number by which a copied prompt's scores and norms are multiplied."""


@dataclass(frozen=True)
class Pilot:
    """Rows of the fact tables: of a whole shard, or as many as fill a row group of the longest."""

    blocks: Mapping[str, Sequence[Block]]
    """By table; without `factors` where there are copies, which would not have their types' bits."""
    prompts: int
    """That were computed; the others are copies."""
    trained: bool
    """With the model's own weights, not with random ones."""


def pilot(plan: RunPlan, sample: Sample, rows: Mapping[str, int]) -> Pilot | None:
    """Compute as many of the first shard's prompts as are cheap; None if those are too few. `rows` are the run's."""
    shard = min(plan.shards.shard_prompts, plan.shards.prompts)
    longest = max(rows["layers"], rows["neurons"], rows["tokens"])
    if not longest or _weights(plan) > WEIGHTS:
        return None
    wanted = min(shard, max(LEAST, ROW_GROUP_ROWS * rows["prompts"] // longest))
    some = sample.examples[:shard]
    count = min(wanted, len(some), int(OPERATIONS / _operations(plan, sample, rows)))
    if count < min(LEAST, shard):
        return None
    chosen = numbered([some[number * len(some) // count] for number in range(count)], count)
    trained = weights_at_hand(plan)
    blocks = _computed(plan, trained_model(plan) if trained else _made(plan), chosen)
    if count < shard:
        blocks.pop("factors", None)
        blocks = _stretched(blocks, count, round(wanted / count), plan.rows)
    return Pilot(blocks, count, trained)


def _weights(plan: RunPlan) -> int:
    d_model = int(plan.model_config.get_text_config().hidden_size)
    matrices = every_matrix(plan.blocks, plan.model_config)
    return sum(m.wide * m.high * m.experts for m in matrices) + plan.rows * d_model


def _operations(plan: RunPlan, sample: Sample, rows: Mapping[str, int]) -> float:
    """Of one prompt, passes over scores and rows reckoned as if they were operations too."""
    config, mean = plan.model_config, sample.mean_length
    d_model = int(config.get_text_config().hidden_size)
    once = 2.0 * mean * sum(m.wide * m.high * m.chosen for m in every_matrix(plan.blocks, config))
    matrices = matrices_of(plan.blocks, plan.wanted, config)
    vectors = mean * sum(m.chosen for m in matrices if m.leads)
    mixes = (rows["layers"] + rows["neurons"]) / rows["prompts"]
    scores = vectors * (2 * d_model + SCORE) + mixes * (2 * mean + SCORE)
    return 2 * once + scores * plan.tokens + ROW * (mixes + rows["tokens"] / rows["prompts"])


def _made(plan: RunPlan) -> LoadedModel:
    """The model with weights that are random, but the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random_model(plan, len(plan.blocks), torch.device("cpu"))


def _computed(plan: RunPlan, loaded: LoadedModel, examples: Sequence[Example]) -> dict[str, list[Block]]:
    lens = make_lens(loaded.anatomy, plan.config.scaling, plan.token_ids)
    lengths = [len(example.token_ids) for example in examples]
    found: dict[str, list[Block]] = {"layers": [], "neurons": [], "tokens": []}
    for indices in pack(lengths, ON_CPU):
        batch = [examples[index] for index in indices]
        for table, blocks in extract(loaded, lens, batch, plan.wanted).blocks.items():
            found.setdefault(table, []).extend(blocks)
    return found


def _stretched(
    blocks: Mapping[str, Sequence[Block]], prompts: int, times: int, vocabulary: int
) -> dict[str, list[Block]]:
    """The rows of `prompts` prompts and of copies of them, `times` as many in all."""
    tokens = _Classes.of_tokens(blocks, prompts, vocabulary)
    neurons = _Classes.of_neurons(blocks["neurons"], prompts)
    found = {table: list(some) for table, some in blocks.items()}
    for number in range(1, times):
        draw = np.random.default_rng(number)
        copy = _Copy(
            number * prompts,
            np.float32(np.exp(SPREAD * draw.standard_normal())),
            tokens.exchanged(draw),
            {place: classes.exchanged(draw) for place, classes in neurons.items()},
        )
        for table, some in blocks.items():
            found[table] += [copy.of(block) for block in some]
    return found


_Place = tuple[int, str, int | None]


@dataclass(frozen=True)
class _Classes:
    """Tokens or neurons, by how many prompts have them: by 1 or none, by 2, by 3 or 4, by 5 to 8, and so on."""

    members: Sequence[np.ndarray]

    @classmethod
    def _by(cls, seen: np.ndarray) -> "_Classes":
        """`seen[prompt, id]`: whether it has it."""
        number = np.ceil(np.log2(np.maximum(seen.sum(0), 1)))
        return cls([np.flatnonzero(number == each) for each in np.unique(number)])

    @classmethod
    def of_tokens(cls, blocks: Mapping[str, Sequence[Block]], prompts: int, vocabulary: int) -> "_Classes":
        seen = np.zeros((prompts, vocabulary), dtype=bool)
        for block in (block for some in blocks.values() for block in some):
            found = block.projections
            if found is not None:
                rows = block.columns["prompt_id"][found.valid, None]
                seen[rows, found.top_ids] = True
                seen[rows, found.bottom_ids] = True
        return cls._by(seen)

    @classmethod
    def of_neurons(cls, blocks: Sequence[Block], prompts: int) -> "dict[_Place, _Classes]":
        pairs: defaultdict[_Place, list[Block]] = defaultdict(list)
        for block in blocks:
            pairs[block.layer, block.module, block.expert].append(block)
        found = {}
        for place, some in pairs.items():
            most = max((int(block.columns["neuron"].max(initial=-1)) for block in some), default=-1)
            seen = np.zeros((prompts, most + 1), dtype=bool)
            for block in some:
                seen[block.columns["prompt_id"], block.columns["neuron"]] = True
            found[place] = cls._by(seen)
        return found

    def exchanged(self, draw: np.random.Generator) -> np.ndarray:
        """What stands for each id: one of its class."""
        found = np.empty(sum(map(len, self.members)), dtype=np.int32)
        for members in self.members:
            found[members] = draw.permutation(members)
        return found


@dataclass(frozen=True)
class _Copy:
    """Makes further prompts' rows of those that were computed."""

    first: int
    """Added to the prompts' numbers."""
    factor: np.float32
    """Of scores and norms."""
    tokens: np.ndarray
    neurons: Mapping[_Place, np.ndarray]
    """What stands for each."""

    def of(self, block: Block) -> Block:
        columns: dict[str, np.ndarray] = {
            name: values * self.factor if values.dtype == np.float32 else values
            for name, values in block.columns.items()
        }
        columns["prompt_id"] = columns["prompt_id"] + self.first
        if "neuron" in columns:
            columns["neuron"] = self.neurons[block.layer, block.module, block.expert][columns["neuron"]]
        lists = {name: Ragged(part.values * self.factor, part.lengths) for name, part in block.lists.items()}
        found = block.projections
        if found is not None:
            found = Projections(
                found.valid,
                self.tokens[found.top_ids],
                found.top_scores * self.factor,
                self.tokens[found.bottom_ids],
                found.bottom_scores * self.factor,
                found.target_score * self.factor,
                (found.target_rank * min(self.factor, 1)).astype(np.int32),
            )
        return replace(block, columns=columns, lists=lists, projections=found)
