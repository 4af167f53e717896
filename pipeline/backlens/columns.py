"""Columns of the run's tables: NumPy arrays per weight matrix, and the Arrow tables made of them.

Arrow tables are made of arrays, without a Python object per row.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from backlens.capture.loss import Outcome
from backlens.projection.project import TopK
from backlens.prompts.prompt import Prompt, Rejected
from backlens.prompts.source import one_line
from backlens.prompts.tokenize import Example
from backlens.store.tables import FAILURES, MODULE, PROMPTS, TABLES, Table

NOT_FINITE = "the loss or a gradient is not a finite number; try --dtype float32"


@dataclass(frozen=True)
class Projections:
    """Projection columns of some rows: those of `TopK` for the valid rows, nulls for the others."""

    valid: np.ndarray
    """True for rows that have a projection."""
    columns: dict[str, np.ndarray]
    """By column name; one row per valid row."""

    @classmethod
    def of(cls, found: TopK, valid: Bool[Tensor, " row"]) -> "Projections":
        return cls(
            valid.cpu().numpy(), {name: column.cpu().numpy() for name, column in found.columns().items()}
        )

    def of_mixes(self, shape: torch.Size, mixes: slice) -> "Projections":
        """Pick some of every prompt's mixes, out of rows laid out as (prompt, mix) of this shape."""
        chosen = np.zeros(shape, dtype=bool)
        chosen[:, mixes] = True
        chosen = chosen.ravel()
        rows = chosen[self.valid]
        return Projections(self.valid[chosen], {name: column[rows] for name, column in self.columns.items()})


@dataclass(frozen=True)
class Ragged:
    """A list per row: all values end to end, and the number of each row's."""

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, values: Float[Tensor, "row value"], lengths: np.ndarray | None = None) -> "Ragged":
        """Take the first `lengths[i]` values of row i, or whole rows if no lengths are given."""
        array = values.cpu().numpy()
        if lengths is None:
            lengths = np.full(len(array), array.shape[1])
        return cls(array[np.arange(array.shape[1]) < lengths[:, None]], lengths)


@dataclass(frozen=True)
class MatrixRows:
    """Rows of one table for one weight matrix: plain columns, lists, and projection columns."""

    layer: int
    module: str
    expert: int | None
    columns: dict[str, np.ndarray]
    lists: dict[str, Ragged] = field(default_factory=dict)
    projections: Projections | None = None


def fact_table(name: str, blocks: Sequence[MatrixRows]) -> pa.Table:
    """Make the Arrow table `name` of blocks of rows, in their order."""
    table = TABLES[name]
    if not blocks:
        return table.empty()
    counts = [len(block.columns["prompt_id"]) for block in blocks]
    columns: dict[str, pa.Array] = {
        "layer": pa.array(np.repeat([block.layer for block in blocks], counts), pa.int16()),
        "module": _modules([block.module for block in blocks], counts),
        "expert": _experts([block.expert for block in blocks], counts),
    }
    for key in blocks[0].columns:
        values = np.concatenate([block.columns[key] for block in blocks])
        columns[key] = pa.array(values).cast(table.schema.field(key).type)
    for key in blocks[0].lists:
        parts = [block.lists[key] for block in blocks]
        ragged = Ragged(
            np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts])
        )
        columns[key] = _lists(ragged, None, table.schema.field(key).type)
    projections = [block.projections for block in blocks if block.projections is not None]
    if projections:
        columns |= _projection_arrays(projections, table)
    return _assemble(table, columns)


def prompt_table(examples: Sequence[Example], outcomes: Sequence[Outcome]) -> pa.Table:
    """Make the `prompts` table of examples, in the order of their batches' outcomes."""
    facts = {
        fact.name: np.concatenate([getattr(outcome, fact.name).cpu().numpy() for outcome in outcomes])
        if outcomes
        else np.empty(0)
        for fact in fields(Outcome)
    }
    facts["target_prob"] = np.exp(facts.pop("target_log_prob"))
    schema = PROMPTS.schema
    columns = facts | {
        "prompt_id": [e.prompt.prompt_id for e in examples],
        "id": [e.prompt.id for e in examples],
        "prompt": [e.prompt.prompt for e in examples],
        "target": [e.prompt.target for e in examples],
        "subject": [e.prompt.subject for e in examples],
        "relation": [e.prompt.relation for e in examples],
        "token_ids": [e.token_ids for e in examples],
        "target_ids": [e.target_ids for e in examples],
        "n_tokens": [len(e.token_ids) for e in examples],
        "subject_start": [e.subject_start for e in examples],
        "subject_end": [e.subject_end for e in examples],
        "meta": [e.prompt.meta for e in examples],
    }
    return _assemble(
        PROMPTS, {name: pa.array(column, schema.field(name).type) for name, column in columns.items()}
    )


def failure_table(rejected: Sequence[Rejected]) -> pa.Table:
    """Make the `failures` table."""
    return pa.Table.from_pylist(
        [
            {"prompt_id": r.prompt_id, "stage": r.stage, "error": r.error, "message": r.message}
            for r in rejected
        ],
        schema=FAILURES.schema,
    )


def without_prompts(table: pa.Table, prompt_ids: Sequence[int]) -> pa.Table:
    """Drop the rows of some prompts."""
    if not prompt_ids:
        return table
    return table.filter(~pc.field("prompt_id").isin(list(prompt_ids)))


def _modules(names: Sequence[str], counts: Sequence[int]) -> pa.DictionaryArray:
    known = sorted(set(names))
    codes = np.repeat([known.index(name) for name in names], counts)
    return pa.DictionaryArray.from_arrays(pa.array(codes, MODULE.index_type), pa.array(known, pa.string()))


def _experts(experts: Sequence[int | None], counts: Sequence[int]) -> pa.Array:
    """Make the `expert` column; null for matrices that see every token."""
    values = np.repeat([-1 if expert is None else expert for expert in experts], counts)
    return pa.array(values.astype(np.int16), pa.int16(), mask=values < 0)


def _projection_arrays(parts: Sequence[Projections], table: Table) -> dict[str, pa.Array]:
    valid = np.concatenate([part.valid for part in parts])
    arrays: dict[str, pa.Array] = {}
    for name in parts[0].columns:
        values = np.concatenate([part.columns[name] for part in parts])
        kind = table.schema.field(name).type
        if pa.types.is_list(kind):
            arrays[name] = _lists(Ragged(values.ravel(), np.where(valid, values.shape[1], 0)), valid, kind)
        else:
            every = np.zeros(len(valid), values.dtype)
            every[valid] = values
            arrays[name] = pa.array(every, kind, mask=~valid)
    return arrays


def _lists(ragged: Ragged, valid: np.ndarray | None, type: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(ragged.lengths)]).astype(np.int32)
    values = pa.array(ragged.values, type.field(0).type)  # type: ignore[attr-defined]
    mask = None if valid is None or valid.all() else pa.array(~valid)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=type, mask=mask)


def _assemble(table: Table, columns: dict[str, pa.Array]) -> pa.Table:
    schema = table.schema
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


@dataclass(frozen=True)
class BatchRows:
    """The rows of one batch."""

    outcome: Outcome
    finite: Bool[Tensor, " prompt"]
    """False for prompts with a number that overflowed; their rows are meaningless."""
    blocks: dict[str, list[MatrixRows]]
    """By table."""
    seconds: dict[str, float]
    """By stage; their sum is the time of the batch. With several threads, those of the busiest."""


class Computed:
    """The rows of several batches, and the prompts that failed."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.outcomes: list[Outcome] = []
        self.failed: list[Rejected] = []
        self.blocks: defaultdict[str, list[MatrixRows]] = defaultdict(list)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.padded = 0
        """Number of tokens in the batches, padding included."""
        self.out_of_memory = 0
        """Number of batches that did not fit into memory."""
        self.batch_tokens = 0
        """Largest number of tokens per batch, as learned so far."""
        self._overflowed: list[int] = []

    def add(self, batch: Sequence[Example], rows: BatchRows) -> None:
        self.examples += batch
        self.outcomes.append(rows.outcome)
        for example, fine in zip(batch, rows.finite.tolist(), strict=True):
            if not fine:
                self._overflowed.append(example.prompt.prompt_id)
                self.failed.append(rejected_prompt(example.prompt, "not-finite", NOT_FINITE))
        self._add_rows(rows.blocks, rows.seconds)

    def merge(self, other: "Computed") -> None:
        """Add what another process computed of the same shard."""
        self.examples += other.examples
        self.outcomes += other.outcomes
        self.failed += other.failed
        self.padded += other.padded
        self._overflowed += other._overflowed
        self._add_rows(other.blocks, other.seconds)

    def _add_rows(self, blocks: Mapping[str, list[MatrixRows]], seconds: Mapping[str, float]) -> None:
        for name, more in blocks.items():
            self.blocks[name] += more
        for stage, taken in seconds.items():
            self.seconds[stage] += taken

    def tables(self, save_factors: bool) -> dict[str, pa.Table]:
        """Make the run's tables of all batches, without prompts whose numbers overflowed."""
        names = ("layers", "neurons", "tokens", *(["factors"] if save_factors else []))
        tables = {name: fact_table(name, self.blocks.pop(name, [])) for name in names}
        tables["prompts"] = prompt_table(self.examples, self.outcomes)
        return {name: without_prompts(table, self._overflowed) for name, table in tables.items()}


def rejected_prompt(prompt: Prompt, error: str, message: str) -> Rejected:
    return Rejected(prompt.prompt_id, "compute", error, one_line(f"{prompt.where}: {message}"))
