"""Rows and bytes that a run writes.

Rows follow from the matrices and the prompts' lengths. Bytes come from a few of the prompts, computed and written as a
run writes them, or from constants per list entry and per scalar. docs/plan.md says how the constants were measured.
"""

import itertools
import math
import random
import re
import string
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import torch
from transformers import PretrainedConfig

from backlens.backward_lens import BackwardLens
from backlens.capture.batch import make_batch
from backlens.capture.loss import Outcome
from backlens.capture.packing import TokenBudget
from backlens.columns import prompt_table
from backlens.config import RunConfig
from backlens.engine.plan import MatrixSize, RunPlan, every_matrix, matrices_of
from backlens.errors import BacklensError
from backlens.models.checkpoint import ModelSource
from backlens.models.device_map import stored_dtype
from backlens.models.load import load_tokenizer
from backlens.prompts.prompt import Prompt, Rejected
from backlens.prompts.read import Survey, read_prompts
from backlens.prompts.tokenize import Example, TargetMode, context_length, tokenize
from backlens.rows import chosen_positions, sequence
from backlens.store.directory import Directory
from backlens.store.parquet import ROW_GROUP_ROWS, write_table
from backlens.store.tables import TABLES
from backlens.terms import WRITES

MOST_PROMPTS = 512
"""Prompts that are tokenized to estimate the rest."""
CHARACTERS = 4
"""Characters per made-up token, the blank before it included."""
SUBJECT = 3
"""Tokens of a made-up subject."""

OPERATIONS = 2e11
"""Operations that the computed prompts may take: two or three seconds of one core."""
SCORE, ROW = 160, 10**6
"""Operations that take as long as the passes over one score, and as one row's way from factors to file."""
LEAST = 2
"""Fewest prompts whose rows say how well many prompts' rows pack."""

SCALARS = {"layers": 10.0, "neurons": 11.0, "tokens": 12.0, "failures": 7.0}
"""Bytes per row, lists left out."""
SCORE_BYTES = 3.05
"""Bytes per score or singular value: a float32 whose exponents pack well."""
ID_BYTES_PER_BIT = 0.1
"""Bytes per token id of a list, per bit of the vocabulary's size."""
FACTOR_BYTES = {torch.float32: 3.4, torch.bfloat16: 2.25, torch.float16: 2.45}
"""Bytes per number of `factors`, by the weights' type."""
REACH = 2**19
"""Distance in bytes up to which zstd finds repeated values."""


@dataclass(frozen=True)
class TypicalPrompts:
    """Prompts that stand for all: the first of the input, or made-up ones."""

    examples: Sequence[Example]
    readable: float
    """Share of the input that can be processed."""
    target_mode: TargetMode
    positions: float
    """Mean number of positions per prompt that have rows in `tokens`."""

    @property
    def lengths(self) -> list[int]:
        """Positions of each prompt, those of a teacher-forced target included."""
        parts = [sequence(example, self.target_mode) for example in self.examples]
        return [len(prompt) + len(target) - 1 for prompt, target in parts]

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / max(len(self.examples), 1)


@dataclass(frozen=True, slots=True)
class AssumedPrompts:
    """Number of prompts that do not exist yet, and their shortest and longest length in tokens."""

    prompts: int
    shortest: int
    longest: int

    @classmethod
    def parse(cls, prompts: int, tokens: str) -> "AssumedPrompts":
        """Raises BacklensError unless `tokens` is like `12` or `8-16`."""
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", tokens)
        ends = [int(end) for end in match.groups() if end is not None] if match else []
        if not ends or ends[0] < 1 or ends[-1] < ends[0]:
            raise BacklensError(
                f'--prompt-tokens "{tokens}": give a length such as 12, or a range such as 8-16'
            )
        return cls(prompts, ends[0], ends[-1])

    def survey(self) -> Survey:
        mean = (self.shortest + self.longest) / 2
        return Survey(self.prompts, 0, None, round(self.prompts * (mean + 1) * CHARACTERS), "")

    def examples(self, vocabulary: int) -> list[Example]:
        draw = random.Random(0)
        count = min(self.prompts, MOST_PROMPTS)
        return [self._example(number, vocabulary, draw) for number in range(count)]

    def _example(self, number: int, vocabulary: int, draw: random.Random) -> Example:
        length = draw.randint(self.shortest, self.longest)
        ids = tuple(draw.randrange(vocabulary) for _ in range(length + 1))
        words = ["".join(draw.choices(string.ascii_lowercase, k=CHARACTERS - 1)) for _ in ids]
        subject = min(SUBJECT, length)
        prompt = Prompt(number, " ".join(words[:-1]), f" {words[-1]}", "", subject=" ".join(words[:subject]))
        return Example(prompt, ids[:-1], ids[-1:], 0, subject)


def first_prompts(config: RunConfig, source: ModelSource, model_config: PretrainedConfig) -> TypicalPrompts:
    """Tokenize the first prompts of the input that can be processed. Raises BacklensError if there are none."""
    assert config.prompts is not None
    records = read_prompts(config.prompts, config.format, config.prompt_fields, config.limit)
    tokenizer = load_tokenizer(source)
    seen, first = 0, None
    while some := list(itertools.islice(records, MOST_PROMPTS)):
        seen += len(some)
        results = tokenize(
            [record for record in some if isinstance(record, Prompt)],
            tokenizer,
            prepend_bos=config.prepend_bos,
            target_mode=config.target_mode,
            context=context_length(model_config),
            rows=int(model_config.vocab_size),
            chat_template=config.chat_template,
        )
        examples = [result for result in results if isinstance(result, Example)]
        if examples:
            return typical_prompts(examples, len(examples) / seen, config)
        first = first or next(record for record in (*some, *results) if isinstance(record, Rejected))
    assert first is not None
    raise BacklensError(f"prompts: none of {seen:,} can be processed; the first: {first.message}")


def typical_prompts(examples: Sequence[Example], readable: float, config: RunConfig) -> TypicalPrompts:
    positions = 0.0
    if examples:
        batch = make_batch(
            [sequence(example, config.target_mode) for example in examples], torch.device("cpu")
        )
        positions = float(chosen_positions(examples, batch, config.positions).sum()) / len(examples)
    return TypicalPrompts(examples, readable, config.target_mode, positions)


@dataclass(frozen=True)
class Estimate:
    """Expected rows and bytes of a run."""

    prompts: int
    tokens: int
    rows: Mapping[str, int]
    bytes: Mapping[str, int]
    computed: int
    """Prompts that were computed to measure bytes; 0 if the bytes come from constants."""


def estimate(plan: RunPlan, prompts: TypicalPrompts, lens: BackwardLens | None) -> Estimate:
    """Estimate a run's rows and bytes; with a `lens`, from some prompts that it computes, if few are cheap enough."""
    count = round(plan.survey.prompts * prompts.readable)
    matrices = matrices_of(plan.blocks, plan.options, plan.model_config)
    rows = _rows(plan, matrices, prompts, count)
    chosen = _cheap_prompts(plan, prompts, rows) if lens is not None else []
    measured = {"prompts": _prompt_rows(plan, prompts)}
    if lens is not None and chosen:
        budget = TokenBudget("auto", lens.loaded.device)
        measured |= lens.compute(chosen, plan.options, budget).tables(plan.options.save_factors)
    constants = _row_bytes(plan, matrices, prompts)
    sizes = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Directory.at(name)
        for table, total in rows.items():
            shard = total / plan.shards.shards
            one = _file_bytes(directory, table, shard, measured.get(table), constants.get(table, 0.0))
            sizes[table] = round(one * plan.shards.shards)
    return Estimate(count, round(count * prompts.mean_length), rows, sizes, len(chosen))


def _rows(
    plan: RunPlan, matrices: Sequence[MatrixSize], prompts: TypicalPrompts, count: int
) -> dict[str, int]:
    wanted, mean = plan.options, prompts.mean_length
    rows = {
        "prompts": count,
        "layers": round(count * sum(m.seen_by(mean) for m in matrices)),
        "neurons": round(count * sum(m.seen_by(mean) * m.kept(wanted.neurons) for m in matrices)),
        "tokens": round(count * sum(m.tokens(prompts.positions) for m in matrices)),
        "failures": plan.survey.prompts - count,
    }
    return rows | ({"factors": rows["tokens"]} if wanted.save_factors else {})


def _cheap_prompts(plan: RunPlan, prompts: TypicalPrompts, rows: Mapping[str, int]) -> list[Example]:
    """Prompts spread over the first shard: enough to fill a row group, or as many as OPERATIONS allows."""
    shard = min(plan.shards.shard_prompts, plan.shards.prompts)
    longest = max(rows["layers"], rows["neurons"], rows["tokens"])
    if not longest:
        return []
    some = prompts.examples[:shard]
    wanted = max(LEAST, ROW_GROUP_ROWS * rows["prompts"] // longest)
    count = min(wanted, len(some), int(OPERATIONS / _operations(plan, prompts, rows)))
    if count < min(LEAST, shard):
        return []
    return _numbered([some[number * len(some) // count] for number in range(count)])


def _operations(plan: RunPlan, prompts: TypicalPrompts, rows: Mapping[str, int]) -> float:
    """Operations per prompt; passes over scores and rows count as the operations that take as long."""
    config, mean = plan.model_config, prompts.mean_length
    d_model = int(config.get_text_config().hidden_size)
    once = 2.0 * mean * sum(m.wide * m.high * m.chosen for m in every_matrix(plan.blocks, config))
    matrices = matrices_of(plan.blocks, plan.options, config)
    vectors = mean * sum(m.chosen for m in matrices if m.leads)
    mixes = (rows["layers"] + rows["neurons"]) / rows["prompts"]
    scores = vectors * (2 * d_model + SCORE) + mixes * (2 * mean + SCORE)
    return 2 * once + scores * plan.tokens + ROW * (mixes + rows["tokens"] / rows["prompts"])


def _prompt_rows(plan: RunPlan, prompts: TypicalPrompts) -> pa.Table:
    """Rows of `prompts` with the texts and ids at hand; losses and predictions are random."""
    draw = torch.Generator().manual_seed(0)
    loss = torch.rand(len(prompts.examples), generator=draw) * 10
    ids = torch.randint(plan.tokens, (2, len(loss)), generator=draw)
    return prompt_table(_numbered(prompts.examples), [Outcome(loss, -loss, ids[0], ids[1])])


def _numbered(examples: Sequence[Example]) -> list[Example]:
    return [
        replace(example, prompt=replace(example.prompt, prompt_id=number))
        for number, example in enumerate(examples)
    ]


def _file_bytes(
    directory: Directory, table: str, rows: float, measured: pa.Table | None, per_row: float
) -> float:
    """Bytes of one shard's file of `rows` rows, at the bytes per row of `measured`, else at `per_row`.

    A file of one row is subtracted, so that few rows do not count the file's own bytes many times.
    """
    write = partial(write_table, directory, f"{table}.parquet", table=TABLES[table])
    if measured is None or not rows:
        return write(TABLES[table].empty()).bytes + per_row * rows
    one = write(measured.slice(0, 1)).bytes
    further = max(1, measured.num_rows - 1)
    return one + (write(measured).bytes - one) / further * (rows - 1)


def _row_bytes(plan: RunPlan, matrices: Sequence[MatrixSize], prompts: TypicalPrompts) -> dict[str, float]:
    """Mean bytes per row of each table, by the constants."""
    mean, positions, k = prompts.mean_length, prompts.positions, plan.options.top_k
    shard = min(plan.shards.shard_prompts, plan.shards.prompts)
    ids = 2 * k * ID_BYTES_PER_BIT * math.log2(plan.tokens)
    lists = ids + 2 * k * SCORE_BYTES
    dtype = stored_dtype(plan.model_config, plan.config.dtype)
    number = FACTOR_BYTES.get(dtype, FACTOR_BYTES[torch.float32])
    rows: dict[str, float] = dict.fromkeys(("layers", "neurons", "tokens", "factors"), 0.0)
    sizes = dict(rows)
    for m in matrices:
        seen, here = m.seen_by(mean), m.tokens(positions)
        neurons = seen * m.kept(plan.options.neurons)
        counts = {"layers": seen, "neurons": neurons, "tokens": here, "factors": here}
        # Behind the last attention, δ is zero at all positions but the one whose logits the loss reads.
        alone = m.layer == len(plan.blocks) - 1 and m.module not in ("attn.k", "attn.v")
        nonzero = min(1.0, 1 / positions) if alone and plan.options.target_mode == "first" else 1.0
        listed = nonzero if m.module in WRITES else 1.0
        repeated = [not m.leads and 4 * shard * here * numbers < REACH for numbers in (k, m.wide)]
        values = min(m.tokens(mean), seen * min(m.wide, m.high))
        taken = {
            "layers": seen * lists + values * SCORE_BYTES,
            "neurons": neurons * lists,
            "tokens": here * listed * (ids if repeated[0] else lists),
            "factors": here * number * (m.high * nonzero + (0 if repeated[1] else m.wide)),
        }
        rows = {table: count + counts[table] for table, count in rows.items()}
        sizes = {table: size + taken[table] for table, size in sizes.items()}
    means = {table: size / rows[table] for table, size in sizes.items() if rows[table]}
    return SCALARS | {table: SCALARS.get(table, 0.0) + mean for table, mean in means.items()}
